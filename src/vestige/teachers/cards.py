"""What is written down about a trained teacher."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from vestige.core.types import InputSpec

_LATER_KEYS = ("accuracy", "task", "task_config", "metric", "score")


class ImageInput(BaseModel):
    """The input spec of an image model, as it stands in recipes and cards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def spec(self) -> InputSpec:
        """The same as an InputSpec."""
        return InputSpec.image(self.channels, self.height, self.width, mean=self.mean, std=self.std)


class OtherInput(BaseModel):
    """The input spec of a model of texts or audio, as it stands in recipes and cards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    shape: tuple[int, ...]
    sample_rate_hz: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        self.spec()
        return self

    @model_serializer(mode="wrap")
    def _without_no_rate(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plain(self)
        return values if values["sample_rate_hz"] else {k: values[k] for k in ("kind", "shape")}

    def spec(self) -> InputSpec:
        """The same as an InputSpec."""
        return InputSpec(self.kind, self.shape, sample_rate_hz=self.sample_rate_hz)


def _sort_of(given: Any) -> str:
    named = given.get("kind") if isinstance(given, Mapping) else getattr(given, "kind", None)
    return "image" if named is None else "other"


INPUTS: Mapping[str, type[BaseModel]] = {"image": ImageInput, "other": OtherInput}
# Images need no kind: they were there first.
AnyInput = Annotated[
    Annotated[ImageInput, Tag("image")] | Annotated[OtherInput, Tag("other")],
    Discriminator(_sort_of),
]


class BuiltinCard(BaseModel):
    """What is known about a teacher whose weights lie beside the card.

    Attributes:
        name: as in "builtin:NAME".
        model: name in `models.factory`.
        args: its arguments.
        input: what one input looks like.
        num_classes: K, number of logits.
        classes: their names, in the order of the logits.
        data: name of the data set it was trained on (split "train").
        train_fingerprint: sha256 of the training images, see `data.image.ImageSet`.
        test_fingerprint: sha256 of the images that it was measured on.
        recipe_sha256: of the recipe's values.
        weights_fingerprint: `fingerprint` of the trained module.
        parameters: number of weights.
        accuracy: on the test split, in [0, 1], measured once after training; None where the task
            is judged otherwise.
        torch: version that it was trained with.
        task: kind of task it was trained for.
        task_config: settings of the task.
        metric: what the task is judged by; None for accuracy.
        score: in this metric, on the test split, measured once after training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    model: str
    args: dict[str, Any]
    input: AnyInput
    num_classes: int = Field(ge=2)
    classes: tuple[str, ...]
    data: str
    train_fingerprint: str
    test_fingerprint: str
    recipe_sha256: str
    weights_fingerprint: str
    parameters: int
    accuracy: float | None = Field(default=None, ge=0, le=1)
    torch: str
    task: str = "classification"
    task_config: dict[str, Any] = Field(default_factory=dict)
    metric: str | None = None
    score: float | None = None

    @model_validator(mode="after")
    def _checked(self) -> Self:
        otherwise = self.metric is not None and self.score is not None
        if otherwise == (self.accuracy is not None):
            raise ValueError("give either accuracy, or metric and score")
        return self

    @property
    def measured(self) -> tuple[str, float]:
        """Name of the metric, and the score in it."""
        if self.metric is not None and self.score is not None:
            return self.metric, self.score
        return "accuracy", self.accuracy or 0.0

    def text(self) -> str:
        """The card as JSON; what came later stands in it where it says something."""
        values = self.model_dump(mode="json")
        for key in _LATER_KEYS:
            if values[key] == type(self).model_fields[key].get_default(call_default_factory=True):
                del values[key]
        return json.dumps(values, indent=2, sort_keys=True) + "\n"
