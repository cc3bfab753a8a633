"""What a recipe may say."""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from vestige.core.types import Access, InputSpec
from vestige.errors import ShapeError
from vestige.federated.partition import PartitionConfig, TestMode
from vestige.federated.settings import FederationConfig
from vestige.recipes.catalog import METHODS
from vestige.training.trainer_config import TrainerConfig


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputConfig(_Strict):
    """The teacher's input: `channels`, `height` and `width` of images, or any `kind` and `shape`.

    Attributes:
        kind: of the numbers; its sets are opened by `data/<kind>.py`.
        shape: of one input: [bytes] for "text", [samples] for "audio"; for images given by the
            three sizes.
        mean: per channel of values in [0, 1]; () means no normalisation.
        std: likewise.
        sample_rate_hz: of audio.
    """

    kind: str = "image"
    shape: tuple[int, ...] | None = None
    channels: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    sample_rate_hz: int = Field(0, ge=0)

    @model_serializer(mode="wrap")
    def _without_later_keys(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plain(self)
        if not values.get("sample_rate_hz"):
            values.pop("sample_rate_hz", None)
        return values

    @model_validator(mode="after")
    def _checked(self) -> Self:
        sizes = (self.channels, self.height, self.width)
        complete = all(sizes) if self.shape is None else not any(sizes)
        if not complete:
            raise ValueError("give either shape, or channels, height and width")
        try:
            self.spec()
        except ShapeError as error:
            raise ValueError(str(error)) from error
        return self

    def spec(self) -> InputSpec:
        """The same as the rest of the library takes it."""
        sizes = (self.channels, self.height, self.width)
        shape = self.shape or tuple(size for size in sizes if size is not None)
        return InputSpec(self.kind, shape, self.mean, self.std, self.sample_rate_hz)


class ModelConfig(_Strict):
    """A network: a name of `vestige list models`, or a factory of the user's own.

    Attributes:
        name: of `vestige list models`; or "smp:ARCHITECTURE/ENCODER", a network of
            segmentation-models-pytorch; or "layers-of-teacher", a shallower network that starts
            from some of the teacher's layers, for teachers of texts and speech.
        factory: "package.module:callable", called with `args`.
        args: of either.
    """

    name: str | None = None
    factory: str | None = None
    args: dict[str, Any] = {}


Split = Literal["train", "select", "test", "all"]


class PartConfig(_Strict):
    """One part of a source of kind "heap".

    Attributes:
        data: as for a source of kind "folder", or "noise" or "textures", which are made up at the
            teacher's size and need a `count`.
        split: as for "folder".
        column: likewise.
        count: likewise.
        shift: distortions of its images, one after another, drawn by the recipe's seed: "invert",
            "tint", "rotate", "thicken", "thin", "blur", "noise", "contrast", "shade"; "a|b" draws
            one of several for each image. Of recordings: "noise", "truncate", "babble" and
            "reversed", see `data.unlabelled.audio_shifts`.
        wanted: whether its images are of the teacher's classes, for the report on what a method
            chose; null where nobody knows. No method is told.
    """

    data: str
    split: Split | None = None
    column: str | None = None
    count: int | None = Field(None, ge=1)
    shift: tuple[str, ...] = ()
    wanted: bool | None = None


class SourceConfig(_Strict):
    """Where inputs come from that the method does not make.

    Attributes:
        kind: "noise", "untrained-generator", "images" (a labelled set of whatever kind the inputs
            are), "folder" (unlabelled images of any size), "heap" (several of these together),
            "pool" (synthetic images that a run left), "clients" (a labelled set that is dealt out
            to the clients of a simulated federation), or "factory", a callable of the user's own.
        distribution: of noise, "normal" per value of the normalised input, or "uniform" images.
        generator: of "untrained-generator", with `generator_width` and `latent_dim`.
        data: of "images", name or folder of a set, with `split`; of "clients" likewise, without; of
            "folder", a folder of pictures at any depth, an .npz or .npy file, a folder of
            datasets.save_to_disk or the name of a set; of "pool", its folder or that of its run.
        split: of "images", null is "train"; of "folder", null is "train" of what has splits and
            everything of what has none.
        origin: of "images", "folder" and "heap": "real" is the teacher's own data (reference arm),
            "foreign" is anything else.
        column: of "folder", where a saved data set has several columns of pictures; of recordings
            "text" takes their transcripts in place of them, which counts as real labels.
        count: of "folder", the first so many after a shuffle by the recipe's seed; null takes all.
        parts: of "heap", by name.
        partition: of "clients", how the train split is dealt out; null is the default one.
        test_part: of "clients", their own parts of the test split: "same-mix" has the mix of
            classes that a client trains on, "owned" as much of each class that it has at all.
        test_each: of "clients" with "same-mix", test examples of a client at most; null is 100.
        factory: of "factory", "package.module:callable"; called with `spec` and `args` it returns
            a Source.
        args: of `factory`.
    """

    kind: Literal[
        "noise", "untrained-generator", "images", "folder", "heap", "pool", "clients", "factory"
    ]
    distribution: Literal["normal", "uniform"] = "normal"
    generator: str = "upsample"
    generator_width: int = 64
    latent_dim: int = 256
    data: str | None = None
    split: Split | None = None
    origin: Literal["real", "foreign", "unlabelled"] = "foreign"
    column: str | None = None
    count: int | None = Field(None, ge=1)
    parts: dict[str, PartConfig] = {}
    partition: PartitionConfig | None = None
    test_part: TestMode = "same-mix"
    test_each: int | None = Field(None, ge=1)
    factory: str | None = None
    args: dict[str, Any] = {}

    @model_serializer(mode="wrap")
    def _without_later_keys(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plain(self)
        if self.kind != "clients":
            for key in ("partition", "test_part", "test_each"):
                values.pop(key, None)
        return values


class PluginConfig(_Strict):
    """A plug-in by name with its settings."""

    name: str
    config: dict[str, Any] = {}


class ArmConfig(_Strict):
    """One arm of a comparison: what differs from the recipe's main run.

    Attributes:
        title: what is shown.
        method: another method than the recipe's; then `config` starts from `shared` alone.
        config: overrides of the method's settings.
        sources: replaces the recipe's sources; None keeps them if the method is the same.
        plugins: replaces the recipe's plug-ins; None keeps them.
    """

    title: str
    method: str | None = None
    config: dict[str, Any] = {}
    sources: dict[str, SourceConfig] | None = None
    plugins: tuple[PluginConfig, ...] | None = None


class Recipe(_Strict):
    """One run, completely described.

    Attributes:
        method: name of `vestige list methods`.
        task: kind of task.
        task_config: settings of the task, such as ignore_index of "segmentation"; what is not given
            is as the teacher's card says, else the task's own default.
        data: name or folder of the set whose test split judges; None judges nothing.
        data_shift: distortions of the images that judge, teacher and student alike, one after
            another, as of a part of a heap; the same images in every run. () judges them as they
            are.
        input: of the teacher; None takes what a built-in or trained teacher's card says.
        num_classes: K; None takes what the teacher's card says.
        teacher: "builtin:NAME", "recipe:NAME", a mapping with `model` or `factory` and `weights`;
            null for a method that needs none, with `input` and `num_classes` in the recipe.
        more_teachers: for methods with several; `num_classes` in a mapping is that teacher's own.
        access: how much of the teachers is shown; less than "white_box" hides their weights.
        query_budget: rows that each teacher answers, where `access` is less than "white_box".
        student: a fresh network; None where the method trains none.
        sources: by the names that the method asks for.
        plugins: outermost first.
        config: settings of the method.
        defaults: where settings come from that are not given: "suggested" asks the method what it
            takes for these networks and inputs, "published" takes the paper's.
        shared: settings that every arm has in common with the main run, whatever its method.
        federation: the engine behind a source of kind "clients".
        trainer: how the run is driven.
        seed: of every stream of randomness.
        arms: runs of a comparison, each told by what differs from the main run.
        headline: the arm that is the main run, whose student the user keeps; chosen here, never by
            a score.
        baseline: arm whose score counts as 0 % of the gap.
        reference: arm whose score counts as 100 % of the gap.
    """

    method: str
    task: str = "classification"
    task_config: dict[str, Any] = {}
    data: str | None = None
    data_shift: tuple[str, ...] = ()
    input: InputConfig | None = None
    num_classes: int | None = Field(None, ge=2)
    teacher: str | dict[str, Any] | None
    more_teachers: tuple[str | dict[str, Any], ...] = ()
    access: Access = Access.WHITE_BOX
    query_budget: int | None = Field(None, ge=1)
    student: ModelConfig | None = None
    sources: dict[str, SourceConfig] = {}
    plugins: tuple[PluginConfig, ...] = ()
    config: dict[str, Any] = {}
    defaults: Literal["suggested", "published"] = "suggested"
    shared: dict[str, Any] = {}
    federation: FederationConfig = FederationConfig()
    trainer: TrainerConfig = TrainerConfig()
    seed: int = Field(0, ge=0)
    arms: dict[str, ArmConfig] = {}
    headline: str | None = None
    baseline: str | None = None
    reference: str | None = None

    @model_serializer(mode="wrap")
    def _without_later_keys(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plain(self)
        # They came later: where they say nothing, records and digests are as they were.
        for key in ("task_config", "data_shift"):
            if not values.get(key):
                values.pop(key, None)
        if not any(source.kind == "clients" for source in self.sources.values()):
            values.pop("federation", None)
        return values

    def method_config(self, suggested: Mapping[str, Any] | None = None) -> Any:
        """The method's own settings, validated; `suggested` is the lowest layer."""
        return METHODS.get(self.method).Config(
            **{**(suggested or {}), **self.shared, **self.config}
        )

    def known_config(self) -> dict[str, Any]:
        """The settings that are certain before the networks are built; plain values.

        All of them, unless the method is to suggest some: then those that are given.
        """
        settings: dict[str, Any] = self.method_config().model_dump(mode="json")
        if self.defaults == "published" or not hasattr(METHODS.get(self.method), "suggest"):
            return settings
        return {key: settings[key] for key in {**self.shared, **self.config}}

    def arm(self, name: str) -> "Recipe":
        """The recipe of one arm, without arms of its own."""
        arm = self.arms[name]
        same = arm.method is None or arm.method == self.method
        sources = self.sources if same and arm.sources is None else arm.sources or {}
        return self.model_copy(
            update={
                "method": arm.method or self.method,
                "config": {**self.config, **arm.config} if same else dict(arm.config),
                "sources": sources,
                "plugins": self.plugins if arm.plugins is None else arm.plugins,
                "arms": {},
                "headline": None,
                "baseline": None,
                "reference": None,
            }
        )

    def to_yaml(self) -> str:
        """The resolved recipe."""
        values = self.model_dump(mode="json")
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        # A few characters, such as U+0085, only survive as escapes.
        if yaml.safe_load(text) != values:
            text = yaml.safe_dump(values, sort_keys=False)
        return str(text)

    def fingerprint(self) -> str:
        """Digest of everything that decides the result."""
        return sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
