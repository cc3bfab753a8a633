"""Segmentation from data to a trained teacher, a run and its evaluation."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel
from torch import nn

import vestige
from vestige.core.protocols import Context
from vestige.core.types import Batch, InputSpec, Loss, Requires, Result, Step, predict
from vestige.data.image import draw_scenes, load_images
from vestige.errors import DataError, RecipeError
from vestige.recipes.examples import fit_classes, load_examples
from vestige.recipes.teacher import train_teacher
from vestige.recipes.teacher_schema import load_teacher_recipe
from vestige.tasks.segmentation import Segmentation
from vestige.teachers.loading import builtin_card, fingerprint, open_teacher, read_card

NAMES = ("ground", "disc", "square")
SPEC = InputSpec.image(3, 32, 32, mean=(0.5,) * 3, std=(0.2,) * 3)
TEACHER = {
    "task": "segmentation",
    "data": "town",
    "input": {"channels": 3, "height": 32, "width": 32, "mean": [0.5] * 3, "std": [0.2] * 3},
    "num_classes": 3,
    "model": {"name": "encoder-decoder", "args": {"widths": [8, 16, 32]}},
    "training": {"epochs": 12, "batch_size": 8, "lr": 0.01, "flip": True},
    "threads": 1,
}

MATCHING = """
import torch
from torch.nn import functional
from pydantic import BaseModel
from vestige.core.types import Batch, Loss, Requires, Result, predict


class Settings(BaseModel):
    rounds: int = 2


class Matching:
    Config = Settings
    requires = Requires(tasks=("segmentation",))

    def __init__(self, cfg, task, teachers, student, sources):
        self.cfg, self.task, self.teacher, self.student = cfg, task, teachers[0], student

    def parts(self):
        return {"student": self.student}

    def loss(self, student, batch):
        with torch.no_grad():
            teacher = predict(self.teacher, batch.inputs)
        answer = predict(student, batch.inputs)
        apart = (answer.logits - teacher.logits).abs().flatten(1).mean(1)
        loss = batch.mean(apart)
        return Loss({"distance": loss}, loss, batch.inputs, teacher, answer)

    def run(self, ctx):
        moves = ctx.optimizer("student", self.student.parameters(), torch.optim.Adam)
        for _ in ctx.rounds("distill", self.cfg.rounds):
            inputs = torch.randn(4, *self.task.spec.shape, generator=ctx.rng)
            yield ctx.update("student", self.student, self.loss, Batch(inputs), moves)

    def result(self):
        return Result("student", self.student)

    def passes(self, cfg):
        return {}
"""


@pytest.fixture
def town(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small set of scenes of three classes, with a border that is ignored."""
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path / "sets"))
    folder = tmp_path / "sets" / "town"
    folder.mkdir(parents=True)
    for split, count, seed in (("train", 110, 1), ("test", 30, 2)):
        images, masks = draw_scenes(count, seed=seed, size=32, num_classes=3, shapes=(1, 2))
        masks[:, 0] = 255
        np.savez(folder / f"{split}.npz", x=images, y=masks, classes=np.array(NAMES))
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "town-net.yaml"
    path.write_text(yaml.safe_dump(TEACHER))
    return path


def test_a_teacher_learns_and_its_card_says_so(town: Path, recipe: Path, tmp_path: Path) -> None:
    losses: list[float] = []
    module, card = train_teacher(
        load_teacher_recipe(recipe),
        tmp_path / "made",
        on_epoch=lambda _, loss: losses.append(loss),
    )
    test = load_images("town", "test").examples(SPEC)
    counts = np.bincount(test[1].flatten(), minlength=256)[:3]
    # Taking every pixel for the most frequent class.
    baseline = counts.max() / counts.sum() / 3
    assert losses[-1] < 0.5 * losses[0]
    assert card.score is not None and card.score > baseline + 0.2
    score = Segmentation(SPEC, 3).evaluate(module, test)["miou"]
    assert card.measured == ("miou", round(score, 6)) and card.accuracy is None
    stored = json.loads((tmp_path / "made/town-net.json").read_text())
    assert stored["task"] == "segmentation" and "accuracy" not in stored
    assert "task_config" not in stored
    assert read_card(tmp_path / "made/town-net.json") == card
    opened = open_teacher(tmp_path / "made/town-net.json")
    assert (opened.task, opened.classes) == ("segmentation", NAMES)
    assert fingerprint(opened.module) == card.weights_fingerprint


def test_a_card_is_evaluated_without_a_recipe(
    town: Path, recipe: Path, tmp_path: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    values = {**TEACHER, "training": {"epochs": 1}, "task_config": {"ignore_index": 9}}
    images, masks = draw_scenes(20, seed=3, size=32, num_classes=3)
    masks[:, 0] = 9
    for split in ("train", "test"):
        np.savez(town / f"{split}.npz", x=images, y=masks, classes=np.array(NAMES))
    recipe.write_text(yaml.safe_dump(values))
    code, out, err = program("train-teacher", recipe, "--out", tmp_path / "made")
    assert code == 0, err
    assert "test mIoU" in out
    card = read_card(tmp_path / "made/town-net.json")
    assert card.task_config == {"ignore_index": 9}
    for target in ("made/town-net.json", "made/town-net.safetensors"):
        code, out, err = program("evaluate", target, "--data", "town", "--json")
        assert code == 0, err
        told = json.loads(out)
        assert told["metric"] == "miou" and round(told["scores"]["miou"], 6) == card.score
        assert told["details"]["pixels"] == 20 * 32 * 31
    code, out, err = program("evaluate", "made/town-net.json", "--data", "town")
    assert code == 0, err
    assert "IoU" in out and "square" in out and "mIoU" in out
    # Not a value that the card's task ignores.
    masks[:, 0] = 255
    np.savez(town / "test.npz", x=images, y=masks, classes=np.array(NAMES))
    code, _, err = program("evaluate", "made/town-net.json", "--data", "town")
    assert code == 2 and "masks with the values 255" in err


def test_a_run_and_its_evaluation(
    town: Path, recipe: Path, tmp_path: Path, program: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "matching.py").write_text(MATCHING)
    recipe.write_text(
        yaml.safe_dump({**TEACHER, "training": {"epochs": 1}, "task_config": {"ignore_index": 255}})
    )
    run = {
        "method": "matching:Matching",
        "task": "segmentation",
        "data": "town",
        "teacher": f"recipe:{recipe}",
        "student": {"name": "encoder-decoder", "args": {"widths": [4, 8]}},
        "trainer": {"device": "cpu", "threads": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    code, _, err = program("validate", "run.yaml")
    assert code == 0, err
    code, _, err = program("run", "run.yaml", "--out", "made")
    assert code == 0, err
    summary = json.loads((tmp_path / "made/summary.json").read_text())
    assert (summary["task"], summary["metric"]) == ("segmentation", "miou")
    told = json.loads((tmp_path / "made/evaluation.json").read_text())
    assert told["pixels"] == 30 * 32 * 31 and told["classes"] == list(NAMES)
    assert told["student"]["miou"] == summary["student"]["score"]
    assert told["teacher"]["miou"] == summary["teacher"]["score"]
    card = json.loads((tmp_path / "made/student.json").read_text())
    # What the teacher's card says, since the recipe says nothing.
    assert card["task"] == "segmentation" and card["task_config"] == {"ignore_index": 255}
    for target in ("made", "made/student.json"):
        code, out, err = program("evaluate", target, "--data", "town", "--json")
        assert code == 0, err
        assert json.loads(out)["scores"]["miou"] == summary["student"]["score"]
    code, out, err = program("evaluate", "made")
    assert code == 0 and "agrees with its teacher" in out, err
    code, _, err = program("run", "run.yaml", "--out", "other", "--set", "task=classification")
    assert code == 2
    assert "serves segmentation, not classification" in err


def test_a_teacher_of_another_task_is_refused(
    program: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    run = {
        "method": "dfad",
        "teacher": "builtin:scenes-encoder-decoder",
        "student": {"name": "encoder-decoder", "args": {"widths": [4, 8]}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    code, _, err = program("run", "run.yaml", "--out", "made")
    assert code == 2
    assert "task: got 'classification', expected 'segmentation'" in " ".join(err.split())


class Settings(BaseModel):
    """No settings."""


class Matching:
    """The student's logits follow the teacher's on noise."""

    Config = Settings
    requires = Requires(tasks=("segmentation",))

    def __init__(self, cfg: Any, task: Any, teachers: Any, student: nn.Module, sources: Any):
        self.task, self.teacher, self.student = task, teachers[0], student

    def parts(self) -> dict[str, Any]:
        return {"student": self.student}

    def loss(self, student: Any, batch: Batch) -> Loss:
        with torch.no_grad():
            teacher = predict(self.teacher, batch.inputs)
        answer = predict(student, batch.inputs)
        loss = batch.mean((answer.logits - teacher.logits).abs().flatten(1).mean(1))
        return Loss({"distance": loss}, loss, batch.inputs, teacher, answer)

    def run(self, ctx: Context) -> Iterator[Step]:
        moves = ctx.optimizer("student", self.student.parameters(), torch.optim.Adam)
        for _ in ctx.rounds("distill", 2):
            inputs = torch.randn(4, *self.task.spec.shape, generator=ctx.rng)
            yield ctx.update("student", self.student, self.loss, Batch(inputs), moves)

    def result(self) -> Result:
        return Result("student", self.student)

    def passes(self, cfg: Any) -> dict[str, float]:
        return {}


def test_distill_takes_settings_of_the_task(tmp_path: Path) -> None:
    images, masks = draw_scenes(6, seed=3, size=32, num_classes=3)
    inputs = SPEC.normalize(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    masks[:, 0] = 7
    data = inputs, torch.from_numpy(masks)
    given: dict[str, Any] = {
        "method": Matching,
        "spec": SPEC,
        "num_classes": 3,
        "task": "segmentation",
        "evaluate": data,
        "device": "cpu",
        "progress": False,
    }

    def networks() -> tuple[nn.Module, nn.Module]:
        return nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    report = vestige.distill(
        *networks(), **given, task_config={"ignore_index": 7}, out=tmp_path / "made"
    )
    assert report.summary["metric"] == "miou" and 0 <= report.summary["student"]["score"] <= 1
    card = json.loads((tmp_path / "made/student.json").read_text())
    assert card["task"] == "segmentation" and card["task_config"] == {"ignore_index": 7}
    with pytest.raises(DataError, match="values 7, expected 0 to 2, or 255"):
        vestige.distill(*networks(), **given)
    with pytest.raises(RecipeError, match="did you mean 'ignore_index'"):
        vestige.distill(*networks(), **given, task_config={"ignore_idx": 7})


def test_classes_of_masks_are_matched_by_name(town: Path) -> None:
    found = load_images("town", "test")
    own = found.examples(SPEC)[1]
    turned, names = fit_classes(found, SPEC, ("square", "ground", "disc"), 3)
    assert names == ("square", "ground", "disc")
    expected = {0: 1, 1: 2, 2: 0, 255: 255}
    for before, after in expected.items():
        assert torch.equal(turned[1] == after, own == before)
    more = load_examples("town", SPEC, classes=("a", "square", "b", "disc", "ground"))[1]
    assert set(more.unique().tolist()) == {1, 3, 4, 255}
    # A value that nobody named would become a class of the network.
    stored = dict(np.load(town / "test.npz"))
    stored["y"][:, 0] = 3
    np.savez(town / "test.npz", **stored)
    with pytest.raises(DataError, match="values 3 in town, which names 3 classes"):
        load_examples("town", SPEC, classes=("a", "square", "b", "disc", "ground"))


def test_classes_called_otherwise_are_compared_by_number(
    town: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = load_images("town", "test")
    with caplog.at_level(logging.WARNING):
        (_, masks), names = fit_classes(found, SPEC, ("x", "y", "z"), 3)
    assert names == ("x", "y", "z") and torch.equal(masks, found.examples(SPEC)[1])
    assert "compared by their numbers" in caplog.text
    with pytest.raises(DataError, match="got 3 classes in town"):
        fit_classes(found, SPEC, (), 4)


def test_masks_with_strange_values_are_told_before_training(town: Path, recipe: Path) -> None:
    recipe.write_text(yaml.safe_dump({**TEACHER, "task_config": {"ignore_index": 9}}))
    with pytest.raises(DataError, match="values 255, expected 0 to 2, or 9"):
        train_teacher(load_teacher_recipe(recipe), None)
    recipe.write_text(yaml.safe_dump({**TEACHER, "task": "classification"}))
    with pytest.raises(Exception, match=r"labels of shape \(99, 32, 32\), expected \(99,\)"):
        train_teacher(load_teacher_recipe(recipe), None)


def test_the_builtin_teacher_scores_what_its_card_says() -> None:
    recipe, card = (
        load_teacher_recipe("scenes-encoder-decoder"),
        builtin_card("scenes-encoder-decoder"),
    )
    train, test = load_images("scenes", "train"), load_images("scenes", "test")
    assert card.recipe_sha256 == recipe.sha256()
    assert (card.train_fingerprint, card.test_fingerprint) == (train.fingerprint, test.fingerprint)
    opened = open_teacher("builtin:scenes-encoder-decoder")
    assert opened.spec is not None
    scores = Segmentation(opened.spec, 5).evaluate(opened.module, test.examples(opened.spec))
    # Rounding may differ between machines; of 819,200 pixels some sit on the edge.
    assert scores["miou"] == pytest.approx(card.score, abs=0.002)
    assert card.score is not None and card.score >= 0.95


def test_a_subset_by_class_trains_and_judges(tmp_path: Path) -> None:
    values = {
        "data": "digits[7,1,4]",
        "input": {"channels": 1, "height": 8, "width": 8},
        "num_classes": 3,
        "model": {"name": "convnet", "args": {"widths": [4, 8, 8]}},
        "training": {"epochs": 3, "lr": 0.02},
        "threads": 1,
    }
    path = tmp_path / "three.yaml"
    path.write_text(yaml.safe_dump(values))
    _, card = train_teacher(load_teacher_recipe(path), None)
    assert card.classes == ("7", "1", "4") and card.data == "digits[7,1,4]"
    assert card.accuracy is not None and card.accuracy > 0.8
    inputs, labels = load_examples("digits[1,7]", card.input.spec(), classes=card.classes)
    assert len(inputs) == 100 and set(labels.tolist()) == {0, 1}
