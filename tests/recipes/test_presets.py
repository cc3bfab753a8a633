"""Every preset of every shipped recipe runs one round, whatever its inputs are."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ngram import NGram, made_up
from safetensors.torch import load_file, save_file

from vestige.core.protocols import LearnsVocabulary, OwnLoss
from vestige.core.texts import to_bytes
from vestige.core.types import count_parameters
from vestige.core.writing import Sampling
from vestige.data.audio import load_audio
from vestige.data.image import BUILT_IN, load_images
from vestige.data.text import load_texts
from vestige.errors import DataError
from vestige.models.factory import build_model
from vestige.models.text import bert
from vestige.recipes import catalog
from vestige.recipes.build import Job
from vestige.recipes.files import read_yaml
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import run_recipe
from vestige.recipes.schema import Recipe
from vestige.recipes.tasks import make_task
from vestige.recipes.teacher_schema import TeacherRecipe, load_teacher_recipe
from vestige.teachers.loading import BuiltinCard, ImageInput, fingerprint
from vestige.training.files import tensors_to_bytes, write_bytes, write_text

PRESETS = [
    (name, preset)
    for name in catalog.shipped()
    # Those whose clients train have no teacher, and a test of their own.
    if read_yaml(name).get("teacher") is not None
    for preset in (read_yaml(name).get("presets") or {"": {}})
]
# The paper's batch and rounds at the smallest size; networks and everything else stay as shipped.
TINY = {
    "rounds": 1,
    "iterations": 1,
    "student_steps": 1,
    "batch_size": 2,
    "warmup": 0,
    "batches_per_round": 1,
    "inversion_steps": 1,
    "synthesis_batch_size": 2,
    "label_batch_size": 8,
    "samples": 8,
    "round_texts": 32,
    "contexts": 4,
    "epochs": 1,
}
# Parts that an arm may leave out, and does so by 0.
CRAFTING = ("guess_steps", "difficulty_steps")
# Networks of full size, and recipes of many arms: from seconds to minutes on two cores.
DEEP_PRESETS = ("gpu", "paper")
DEEP = [
    *(("zerogen-arms", "cpu"), ("zerogen-arms", "smoke"), ("udistil-whisper", "cpu")),
    *(("dfad-seg", "camvid"), ("dfad-seg", "cpu"), ("mosaickd-seg", "cpu")),
]
KINDS = {"text": "text", "speech": "audio"}
# Of images some methods want more than a few; texts and recordings are read by larger networks.
FEW_IMAGES, FEW = 64, 12


def is_deep(name: str, preset: str) -> bool:
    return preset in DEEP_PRESETS or (name, preset) in DEEP


def writer() -> Callable[[list[str]], list[str]]:
    """Writes a text of some topic, whatever it is asked; stands for a language model."""
    teacher, rng = NGram(made_up(200)), torch.Generator().manual_seed(0)

    def write(prompts: list[str]) -> list[str]:
        return [teacher.generate([one], 1, Sampling(), rng)[0][0].text for one in prompts]

    return write


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks that were made for one preset and serve the others, too."""
    return tmp_path_factory.mktemp("networks")


def random_weights(model: str, num_classes: int, folder: Path) -> Path:
    """A file of them, in the shape that the gpu and paper presets ask for."""
    path = folder / f"{model}-{num_classes}.safetensors"
    if not path.exists():
        spec = ImageInput(channels=3, height=32, width=32).spec()
        save_file(build_model(model, spec, num_classes).state_dict(), path)
    return path


def saved_by_transformers(num_classes: int, folder: Path) -> Path:
    """A folder with a classifier of texts and its tokenizer, as a user has one."""
    transformers = pytest.importorskip("transformers")
    path = folder / f"bert-{num_classes}"
    if not path.exists():
        made = bert(num_classes, layers=12, width=8, heads=2, vocabulary=300, tokens=64)
        made.learn_vocabulary(to_bytes([text for text, _ in made_up(40)], 128))
        (folder / "tokenizer.json").write_text(made.described_tokenizer(), encoding="utf8")
        marks = {name: f"[{name.upper()}]" for name in ("cls", "sep", "pad", "mask", "unk")}
        transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            model_max_length=64,
            **{f"{name}_token": mark for name, mark in marks.items()},
        ).save_pretrained(path)
        made.network.save_pretrained(path)
    return path


def put_in_cache(name: str, cache: Path) -> None:
    """The recipe's own network, hardly trained, under the name that the cache uses.

    Only how well it was trained is not as the recipe says, and that is not what a run of one round
    is about: weights, card, digest and fingerprints are checked on loading as always.
    """
    recipe = load_teacher_recipe(name)
    stem = cache / "teachers" / f"{recipe.name}-{recipe.sha256()[:12]}"
    if stem.with_suffix(".json").exists():
        return
    spec = recipe.input.spec()
    module = build_model(recipe.model.name, spec, recipe.num_classes, **recipe.model.args)
    classes: tuple[str, ...] = tuple(map(str, range(recipe.num_classes)))
    if isinstance(module, LearnsVocabulary):
        found = catalog.DATA.get(spec.kind).open(recipe.data, "train")
        inputs, labels = found.examples(spec)
        module.learn_vocabulary(inputs if labels.dim() == 1 else labels)
        classes = tuple(found.classes)
        if spec.kind == "audio":
            learn_to_stop(module, inputs, labels)
    metric = make_task(recipe.task, spec, recipe.num_classes, recipe.task_config).metric
    write_bytes(stem.with_suffix(".safetensors"), tensors_to_bytes(module.state_dict()))
    write_text(stem.with_suffix(".json"), card_of(recipe, module, classes, metric).text())


def card_of(recipe: TeacherRecipe, module: Any, classes: tuple[str, ...], metric: str) -> Any:
    accurate = metric == "accuracy"
    scored = {"accuracy": 0.1} if accurate else {"metric": metric, "score": 0.5}
    return BuiltinCard(
        name=recipe.name,
        model=recipe.model.name,
        args=recipe.model.args,
        input=recipe.input,
        num_classes=recipe.num_classes,
        classes=classes,
        data=recipe.data,
        train_fingerprint="",
        test_fingerprint="",
        recipe_sha256=recipe.sha256(),
        weights_fingerprint=fingerprint(module),
        parameters=count_parameters(module),
        torch=torch.__version__,
        task=recipe.task,
        task_config=recipe.task_config,
        **scored,
    )


def learn_to_stop(module: Any, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    """Some steps of a recogniser: what it hears without end would be dropped, and all of it."""
    assert isinstance(module, OwnLoss)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for step in range(30):
        rows = torch.arange(8 * step, 8 * step + 8) % len(inputs)
        optimizer.zero_grad()
        module.training_loss(inputs[rows], labels[rows]).backward()
        optimizer.step()


def test_the_parts_of_a_heap_are_few():
    recipe = small_heaps(load_recipe("udistil-whisper"))
    counts = {part.count for part in recipe.sources["audio"].parts.values()}
    assert counts == {6}
    inner = recipe.arm("labels").sources["transcripts"].parts
    assert {part.count for part in inner.values()} == {6}


@pytest.mark.parametrize(
    ("name", "preset"),
    [pytest.param(*case, marks=pytest.mark.slow if is_deep(*case) else ()) for case in PRESETS],
)
def test_every_preset_runs_one_round_at_batch_2(
    name: str, preset: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    raw = load_recipe(name, preset=preset or None)
    kind = KINDS.get(raw.task, "image")
    skip_without_data(raw, kind)
    if raw.data != BUILT_IN:
        # Judging 10,000 images by two ResNets takes minutes; a few go the same way.
        monkeypatch.setattr("vestige.data.image.load_images", few_images)
        monkeypatch.setattr("vestige.data.text.load_texts", few_texts)
        monkeypatch.setattr("vestige.data.audio.load_audio", few_recordings)
        monkeypatch.setattr("vestige.recipes.unlabelled_audio.load_audio", few_recordings)
    overrides = ["trainer.device=cpu", *stand_ins(raw, folder, monkeypatch)]
    recipe = small_heaps(load_recipe(name, preset=preset or None, overrides=overrides))
    for arm in [None, *recipe.arms]:
        run = recipe if arm is None else recipe.arm(arm)
        known = run.method_config().model_dump()
        tiny = {key: value for key, value in TINY.items() if key in known}
        tiny |= {key: 1 for key in CRAFTING if known.get(key)}
        run = run.model_copy(update={"config": {**run.config, **tiny}})
        before: dict[str, torch.Tensor] = {}

        def keep(job: Job, before: dict[str, torch.Tensor] = before) -> None:
            assert job.student is not None
            before |= {key: value.clone() for key, value in job.student.state_dict().items()}

        # A round without BatchNorm's two rows would have failed here.
        summary = run_recipe(run, tmp_path / (arm or "main"), report=False, built=keep)
        after = load_file(tmp_path / (arm or "main") / "student.safetensors")
        assert summary["complete"]
        check_steps(run, summary)
        check_queries(run, summary)
        assert any(not torch.equal(before[key], after[key]) for key in before)
        assert all(torch.isfinite(value.float()).all() for value in after.values())


def check_steps(run: Recipe, summary: Mapping[str, Any]) -> None:
    """As many steps as the passes of the round say, and those of inputs that are optimised."""
    passes, cfg = passes_of(run), run.method_config()
    steps = sum(count for key, count in passes.items() if key.endswith("_step"))
    # A pool method that has no generator inverts one batch instead of a generator step.
    steps += "pool" in summary and "generator_step" not in passes
    steps += sum(getattr(cfg, key, 0) for key in CRAFTING)
    # One step moves a network and what reads it.
    steps -= sum(passes.get(key, 0) for key in ("head_step", "memory_generator_step"))
    assert summary["steps"] == steps


def check_queries(run: Recipe, summary: Mapping[str, Any]) -> None:
    """As many rows as the passes of the round say, and what is asked before it begins."""
    passes, cfg = passes_of(run), run.method_config()
    forwards = passes.get("teacher_forward", 0) + passes.get("teacher_observed", 0)
    if getattr(cfg, "mix_foreign", False):
        # The student sees as many foreign images as fakes.
        forwards += passes["student_step"]
    first = summary["images_made"] if "records" in summary else 0
    if run.method == "pre-dfkd" or first or "filtered" in summary:
        assert summary["teacher_queries"] >= 2 * forwards + first
        return
    assert summary["teacher_queries"] == 2 * forwards


def passes_of(recipe: Recipe) -> Mapping[str, float]:
    """Passes of a round, which are a matter of the settings alone."""
    method = catalog.METHODS.get(recipe.method)
    passes: Mapping[str, float] = method.passes(object.__new__(method), recipe.method_config())
    return passes


def skip_without_data(recipe: Recipe, kind: str) -> None:
    """Skip where a set lies in no data folder."""
    sources = recipe.sources.values()
    needed = {recipe.data, *(source.data for source in sources)}
    if kind == "audio":
        # Parts of a heap of images may be made up, and lie nowhere.
        needed |= {part.data for source in sources for part in source.parts.values()}
    for name in sorted(needed - {None}):
        try:
            catalog.DATA.get(kind).find(name, "test")
        except DataError as error:
            pytest.skip(str(error))


def stand_ins(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that put networks without training in the place of the teachers."""
    teacher = recipe.teacher
    if writes(recipe):
        own = teacher if isinstance(teacher, dict) else {}
        prompts = own.get("prompts", "ag-news")
        other = "".join(f", {key}: '!drop'" for key in own if key != "prompts")
        return [f"teacher={{factory: '{__name__}:writer', prompts: {prompts}{other}}}"]
    if isinstance(teacher, dict) and "model" in teacher:
        weights = random_weights(teacher["model"], recipe.num_classes or 0, folder)
        return [f"teacher.weights={weights}"]
    if isinstance(teacher, str) and re.match("hf:", teacher):
        return [f"teacher=hf:{saved_by_transformers(4, folder)}"]
    for one in (teacher, *recipe.more_teachers):
        if isinstance(one, str) and one.startswith("recipe:"):
            monkeypatch.setenv("VESTIGE_CACHE", str(folder))
            put_in_cache(one.removeprefix("recipe:"), folder)
    return []


def writes(recipe: Recipe) -> bool:
    """Whether the teacher is to write texts, which no network does without training."""
    return "labels" in str(catalog.METHODS.get(recipe.method).requires.access)


def small_heaps(recipe: Recipe) -> Recipe:
    """Six recordings of each part of a heap, in all arms."""

    def smaller(sources: Mapping[str, Any]) -> dict[str, Any]:
        made = {}
        for key, source in sources.items():
            parts = {
                name: part.model_copy(update={"count": 6}) for name, part in source.parts.items()
            }
            made[key] = source.model_copy(update={"parts": parts}) if parts else source
        return made

    if recipe.task != "speech":
        return recipe
    arms = {
        key: arm.model_copy(update={"sources": smaller(arm.sources)}) if arm.sources else arm
        for key, arm in recipe.arms.items()
    }
    return recipe.model_copy(update={"sources": smaller(recipe.sources), "arms": arms})


@functools.cache
def few_images(name: str, split: str) -> Any:
    found = load_images(name, split)
    return replace(found, images=found.images[:FEW_IMAGES], labels=found.labels[:FEW_IMAGES])


@functools.cache
def few_texts(name: str, split: str) -> Any:
    found = load_texts(name, split)
    return replace(found, texts=found.texts[:FEW], labels=found.labels[:FEW])


@functools.cache
def few_recordings(name: str, split: str) -> Any:
    found = load_audio(name, split)
    return replace(found, utterances=found.utterances[:FEW])
