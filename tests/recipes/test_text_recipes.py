"""Texts from data to a trained teacher, a run on real texts, its page, evaluation and export."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vestige.core.texts import to_bytes
from vestige.data.text import load_texts
from vestige.errors import ExportError, Interrupted, RecipeError
from vestige.models.text import TextClassifier
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import run_recipe
from vestige.recipes.teacher import train_teacher
from vestige.recipes.teacher_schema import TeacherRecipe, load_teacher_recipe, on_other_data
from vestige.tasks.text import Text
from vestige.teachers.loading import load_teacher, open_teacher, read_card
from vestige.training.export.student import export

transformers = pytest.importorskip("transformers", reason="needs the extra [text]")

CLASSES = ("animals", "tools", "weather")
WORDS = (
    ["cat", "dog", "horse", "fish", "bird", "cow", "sheep"],
    ["hammer", "saw", "drill", "pliers", "nail", "wrench", "file"],
    ["rain", "snow", "sun", "wind", "fog", "storm", "hail"],
)
FILLERS = ["the", "a", "was", "seen", "there", "and", "near", "by", "some", "old", "new", "very"]
TEACHER = {
    "task": "text",
    "data": "things",
    "input": {"kind": "text", "shape": [64]},
    "num_classes": 3,
    "model": {
        "name": "bert",
        "args": {
            "layers": 2,
            "width": 32,
            "heads": 2,
            "vocabulary": 200,
            "tokens": 16,
            "dropout": 0.0,
        },
    },
    "training": {"epochs": 20, "batch_size": 16, "lr": 0.003},
    "threads": 1,
}
RUN = {
    "method": "kd",
    "defaults": "published",
    "task": "text",
    "data": "things",
    "student": {"name": "layers-of-teacher", "args": {"layers": 1, "start": "embeddings"}},
    "sources": {"inputs": {"kind": "images", "data": "things", "origin": "real"}},
    "trainer": {"threads": 1, "device": "cpu"},
    "config": {
        "rounds": 2,
        "iterations": 4,
        "batch_size": 16,
        "student_lr": 0.001,
        "student_optimizer": "adam",
        "student_weight_decay": 0,
        "schedule": "cosine",
        "loss": "kl",
    },
}


def lines(count: int, seed: int, classes: int = 3) -> str:
    """Texts whose class is told by one word among fillers."""
    rng = torch.Generator().manual_seed(seed)

    def pick(among: list[str]) -> str:
        return among[int(torch.randint(len(among), (), generator=rng))]

    rows = []
    for number in range(count):
        label = number % classes
        words = [pick(FILLERS) for _ in range(4)]
        words.insert(int(torch.randint(5, (), generator=rng)), pick(WORDS[label]))
        rows.append(json.dumps({"text": " ".join(words), "label": CLASSES[label]}))
    return "\n".join(rows) + "\n"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for name, classes in (("things", 3), ("fewer", 2)):
        (root / name).mkdir()
        (root / name / "train.jsonl").write_text(lines(384, 0, classes))
        (root / name / "test.jsonl").write_text(lines(60, 1, classes))
    return root


@pytest.fixture(autouse=True)
def folders(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VESTIGE_DATA", str(sets))
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))


def recipe(tmp_path: Path, **changes: Any) -> TeacherRecipe:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TEACHER, **changes}))
    return load_teacher_recipe(path)


@pytest.fixture(scope="module")
def made(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained teacher, and a finished run of its student in `run`."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VESTIGE_DATA", str(sets))
        train_teacher(recipe(root), root)
        path = root / "run.yaml"
        path.write_text(yaml.safe_dump({**RUN, "teacher": str(root / "tiny.json")}))
        run_recipe(load_recipe(path), root / "run", command="vestige run run.yaml")
    return root


# Teachers


def test_a_teacher_learns_its_words_and_the_card_says_what_it_takes(made: Path) -> None:
    card = read_card(made / "tiny.json")
    assert (card.task, card.classes, card.model) == ("text", CLASSES, "bert")
    assert (card.input.kind, card.input.shape) == ("text", (64,))
    # Chance is a third, and one word in five tells the class.
    assert card.accuracy is not None and card.accuracy > 0.9
    opened = open_teacher(made / "tiny.json")
    assert (opened.task, opened.classes, opened.num_classes) == ("text", CLASSES, 3)
    test = load_texts("things", "test").examples(opened.spec)
    assert Text(opened.spec, 3).evaluate(opened.module, test)["accuracy"] == pytest.approx(
        card.accuracy
    )
    assert card.train_fingerprint == load_texts("things", "train").fingerprint
    assert opened.module.words(torch.arange(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_the_same_recipe_writes_the_same_bytes_even_if_it_was_stopped(tmp_path: Path) -> None:
    model = {"name": "bert", "args": {"layers": 1, "width": 8, "vocabulary": 60, "dropout": 0.2}}
    small = recipe(tmp_path, model=model, training={"epochs": 3, "batch_size": 32})

    def stop(epoch: int, loss: float) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train_teacher(small, tmp_path / "stopped", on_epoch=stop)
    assert not (tmp_path / "stopped" / "tiny.json").exists()
    train_teacher(small, tmp_path / "stopped", resume=True)
    train_teacher(small, tmp_path / "whole")
    for name in ("tiny.safetensors", "tiny.json"):
        stopped, whole = ((tmp_path / one / name).read_bytes() for one in ("stopped", "whole"))
        assert stopped == whole


def test_another_set_gives_its_classes_and_its_name(
    program: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    recipe(tmp_path, training={"epochs": 1, "batch_size": 32})
    code, out, _ = program("train-teacher", "tiny.yaml", "--data", "fewer", "--out", "teachers")
    assert (code, "test accuracy" in out) == (0, True)
    card = read_card(tmp_path / "teachers" / "tiny-fewer.json")
    assert (card.data, card.num_classes, card.classes) == ("fewer", 2, CLASSES[:2])
    same = recipe(tmp_path)
    assert on_other_data(same, "things") is same


def test_the_shipped_recipe_is_for_texts() -> None:
    shipped = load_teacher_recipe("bert-tiny")
    assert (shipped.task, shipped.input.spec().kind, shipped.model.name) == ("text", "text", "bert")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": {"kind": "text"}}, "shape"),
        (
            {"input": {"kind": "text", "shape": [64], "shap": 1}},
            "input.shap: .*did you mean 'shape'",
        ),
        ({"input": {"channels": 1, "height": 8, "widht": 8}}, "input.widht: .* mean 'width'"),
        ({"input": {"kind": "words", "shape": [64]}}, "words"),
        ({"num_classes": 4}, "expected 3"),
        ({"model": {"name": "convnet"}}, "convnet"),
        ({"task": "texts"}, "did you mean 'text'"),
        ({"training": {"epochs": 1, "flip": True}}, "flip"),
    ],
)
def test_mistakes_in_a_recipe_for_texts_are_told(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train_teacher(recipe(tmp_path, **changes), None)


# Runs


def test_a_run_on_real_texts_leaves_what_can_be_read(made: Path) -> None:
    run = made / "run"
    found = json.loads((run / "readings.json").read_text())
    assert found["schema"] == 1
    assert {one["class"] for one in found["classes"]} == set(CLASSES)
    texts = set(load_texts("things", "train").texts)
    assert all(text in texts for one in found["classes"] for text in one["texts"])
    told = json.loads((run / "evaluation.json").read_text())
    assert told["texts"] and set(told["texts"][0]) == {"text", "truth", "student", "teacher"}
    assert all(one["truth"] != one["student"] for one in told["texts"])
    page = (run / "report.html").read_text()
    assert "What the student learned from" in page and "What it got wrong" in page
    assert told["texts"][0]["text"] in page
    assert found["classes"][0]["texts"][-1] in page
    summary = json.loads((run / "summary.json").read_text())
    assert summary["student"]["score"] > 0.3
    assert [one["purpose"] for one in summary["real_data"]].count("distillation") == 1


def test_the_student_is_loaded_again_and_can_teach(
    made: Path, program: Callable[..., tuple[int, str, str]]
) -> None:
    card = json.loads((made / "run" / "student.json").read_text())
    assert (card["model"], card["input"]["kind"]) == ("transformer", "text")
    student = load_teacher(made / "run" / "student.json")
    assert isinstance(student, TextClassifier) and len(student.layers) == 1
    teacher = load_teacher(made / "tiny.json")
    assert student.described_tokenizer() == teacher.described_tokenizer()
    summary = json.loads((made / "run" / "summary.json").read_text())
    code, out, err = program("evaluate", made / "run", "--json")
    assert code == 0, err

    assert json.loads(out)["scores"]["accuracy"] == pytest.approx(summary["student"]["score"])


def test_a_run_goes_on_where_it_stopped(made: Path, tmp_path: Path) -> None:
    weights = (made / "run" / "student.safetensors").read_bytes()
    path = made / "run.yaml"
    run_recipe(load_recipe(path, overrides=["trainer.max_steps=5"]), tmp_path / "b", report=False)
    run_recipe(load_recipe(path), tmp_path / "b", resume=True, report=False)
    assert (tmp_path / "b" / "student.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"name": "layers-of-teacher"}}, "missing a required argument: 'layers'"),
        ({"student": {"name": "layers-of-teacher", "args": {"layers": 9}}}, "expected 1 to 2"),
        (
            {"student": {"name": "layers-of-teacher", "args": {"layers": 1, "deep": 2}}},
            "deep.* expected some of layers, choose",
        ),
        ({"student": {"name": "convnet"}}, "convnet"),
    ],
)
def test_students_that_cannot_be_made_are_told(
    changes: dict[str, Any], message: str, made: Path, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({**RUN, "teacher": str(made / "tiny.json"), **changes}))
    with pytest.raises(ValueError, match=message):
        run_recipe(load_recipe(path), tmp_path / "out", report=False)


def test_a_teacher_without_layers_to_give_is_told(tmp_path: Path) -> None:
    overrides = ["student.name=layers-of-teacher", "student.args={layers: 1}"]
    with pytest.raises(RecipeError, match=r"ConvNet as teacher, of whose layers no student"):
        run_recipe(load_recipe("kd", preset="smoke", overrides=overrides), tmp_path / "out")


# Export


def test_the_hub_folder_is_opened_by_transformers_alone(made: Path, tmp_path: Path) -> None:
    folder = export(made / "run", to="hub", out=tmp_path / "hub").path
    reader = transformers.AutoTokenizer.from_pretrained(folder / "transformers")
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "transformers"
    ).eval()
    assert network.config.id2label == dict(enumerate(CLASSES))
    texts = load_texts("things", "test").texts[:9]
    student = load_teacher(made / "run" / "student.json")
    # Filled up to one length or not, a batch is the same to rounding.
    torch.testing.assert_close(
        network(**reader(texts, return_tensors="pt", padding=True)).logits,
        student(to_bytes(texts, 64)),
        atol=1e-5,
        rtol=1e-4,
    )
    readme = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in readme
    code = readme.split("```python\n")[2].split("```")[0]
    space: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code, space)
        again = load_teacher("student.json")
    assert space["logits"].shape == (1, 3)
    assert torch.equal(again(to_bytes(texts, 64)), student(to_bytes(texts, 64)))
    export(made / "run", to="hub", out=folder)
    assert sorted(one.name for one in folder.iterdir() if one.is_dir()) == ["transformers"]


def test_a_damaged_hub_folder_is_replaced_whole(made: Path, tmp_path: Path) -> None:
    (tmp_path / "hub" / "transformers").mkdir(parents=True)
    (tmp_path / "hub" / "transformers" / "pytorch_model.bin").write_text("old")
    shutil.copytree(tmp_path / "hub" / "transformers", tmp_path / "hub" / ".transformers.part")
    folder = export(made / "run", to="hub", out=tmp_path / "hub").path / "transformers"
    names = {one.name for one in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_onnx_of_texts_is_refused_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"network of texts .*--to hub"):
        export(made / "run", to="onnx", out=tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
