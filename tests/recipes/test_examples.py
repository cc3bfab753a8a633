"""A stranger's own data, from Python, in a recipe and on the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vestige
from vestige.core.types import InputSpec
from vestige.data.image import load_images, to_inputs
from vestige.errors import DataError, RecipeError
from vestige.recipes.evaluate import evaluate
from vestige.recipes.examples import distorted, fit_classes, load_examples
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import run_recipe
from vestige.recipes.teacher import train_teacher
from vestige.recipes.teacher_schema import load_teacher_recipe
from vestige.training.pictures import save_png

SPEC = InputSpec.image(1, 16, 16, mean=(0.3058,), std=(0.3193,))
TEACHER = "builtin:digits-convnet"
RECIPE = """
method: kd
data: DATA
teacher: builtin:digits-convnet
student: {name: convnet, args: {widths: [2, 4, 8]}}
sources: {inputs: {kind: images, data: SOURCE, origin: foreign}}
trainer: {device: cpu, threads: 1, max_steps: 2}
"""


def pictures(folder: Path, *, count: int = 120, names: str = "0123456789", only: int = 10) -> None:
    """Digits of the built-in test split as PNG files by class; `only` the first classes."""
    test = load_images("digits", "test")
    for number in range(count):
        label = int(test.labels[number])
        if label < only:
            (folder / names[label]).mkdir(parents=True, exist_ok=True)
            save_png(test.images[number], folder / names[label] / f"{number}.png")


def test_a_folder_a_file_and_tensors_score_the_same(tmp_path: Path) -> None:
    test = load_images("digits", "test")
    pictures(tmp_path / "mine/test")
    np.savez(tmp_path / "mine.npz", x=test.images[:120], y=test.labels[:120].astype(np.uint8))
    teacher = vestige.load_teacher(TEACHER)
    by_hand = (to_inputs(test.images[:120], SPEC), torch.from_numpy(test.labels[:120]))
    scores = set()
    for found in (
        vestige.load_examples(str(tmp_path / "mine/test"), SPEC),
        vestige.load_examples(str(tmp_path / "mine"), SPEC),
        vestige.load_examples(str(tmp_path / "mine.npz"), SPEC),
        by_hand,
    ):
        inputs, labels = found
        right = (teacher(inputs).argmax(1) == labels).sum().item()
        pairs = sorted(zip(inputs.flatten(1).sum(1).tolist(), labels.tolist(), strict=True))
        scores.add((right, tuple(pairs)))
    assert len(scores) == 1
    assert scores.pop()[0] >= 115


def test_classes_are_numbered_as_the_network_numbers_them(tmp_path: Path) -> None:
    pictures(tmp_path / "test", names="jihgfedcba", only=4)
    asked = str(tmp_path / "test")
    own = load_examples(asked, SPEC)[1]
    named = load_examples(asked, SPEC, classes=list("jihgfedcba"))[1]
    # The folders are g, h, i and j; the network calls its class 0 j.
    assert torch.equal(own, 3 - named) and set(named.tolist()) == {0, 1, 2, 3}
    with pytest.raises(DataError, match="got 4 classes in test"):
        load_examples(asked, SPEC, classes=list("abcdefgh"))


def test_a_network_has_more_classes_than_unnamed_labels_show(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", x=np.zeros((3, 4, 4), np.uint8), y=[0, 1, 0])
    found = load_images(str(tmp_path / "few.npz"), "test")
    for known in ((), tuple("abcd")):
        (_, labels), names = fit_classes(found, SPEC, known, 4)
        assert labels.tolist() == [0, 1, 0] and names == (known or tuple("0123"))


def test_names_that_fit_in_part_only_are_refused(tmp_path: Path) -> None:
    images = np.zeros((3, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", x=images, y=[0, 1, 2], classes=["cat", "dog", "bird"])
    found = load_images(str(tmp_path / "a.npz"), "test")
    # Taken by number, dogs would be judged as cats.
    with pytest.raises(DataError, match=r"stand elsewhere \(dog\)"):
        fit_classes(found, SPEC, ("dog", "kitten", "bird"), 3)
    (_, labels), _ = fit_classes(found, SPEC, ("kitten", "dog", "bird"), 3)
    assert labels.tolist() == [0, 1, 2]


def test_folders_that_are_numbers_of_unequal_length_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in range(11):
        (tmp_path / f"test/{name}").mkdir(parents=True)
        save_png(np.zeros((4, 4), np.uint8), tmp_path / f"test/{name}/a.png")
    found = load_images(str(tmp_path / "test"), "test")
    fit_classes(found, SPEC, (), 11)
    assert "order of their names as text (0, 1, 10, 2, 3, ...)" in caplog.text
    caplog.clear()
    (_, labels), _ = fit_classes(found, SPEC, tuple(map(str, range(11))), 11)
    assert sorted(labels.tolist()) == list(range(11)) and not caplog.records


def test_a_run_on_pictures_and_its_evaluation_agree(program, tmp_path: Path) -> None:
    pictures(tmp_path / "mine/test", only=7)
    pictures(tmp_path / "foreign", count=60)
    (tmp_path / "my.yaml").write_text(
        RECIPE.replace("DATA", "./mine").replace("SOURCE", "./foreign")
    )
    code, out, err = program("validate", "my.yaml")
    assert code == 0, err
    code, out, err = program("run", "my.yaml", "--out", "made")
    assert code == 0, err
    summary = json.loads((tmp_path / "made/summary.json").read_text())
    assert summary["teacher"]["score"] > 0.95
    read = {one["purpose"]: one for one in summary["real_data"]}
    # Seven of the network's ten classes; of the foreign ones four fifths.
    test = load_images(str(tmp_path / "mine"), "test")
    assert read["evaluation"]["fingerprint"] == test.fingerprint and len(test.classes) == 7
    assert 35 < read["distillation"]["images"] < 60
    for data in ((), ("--data", "mine"), ("--data", "mine/test")):
        code, out, err = program("evaluate", "made", *data, "--json")
        assert code == 0, err
        assert json.loads(out)["scores"]["accuracy"] == summary["student"]["score"]
        assert json.loads(out)["data_fingerprint"] == test.fingerprint
    (tmp_path / "mine/test/0/bad.png").write_bytes(b"no picture")
    code, _, err = program("run", "my.yaml", "--out", "again")
    assert code == 2 and "bad.png, which cannot be read as a picture" in err


def test_a_heap_of_pictures_is_judged_whole_by_its_path_and_in_part_by_a_recipe(
    program, tmp_path: Path
) -> None:
    pictures(tmp_path / "heap")
    code, out, _ = program("evaluate", TEACHER, "--data", "heap", "--json")
    assert code == 0
    assert (json.loads(out)["data"], json.loads(out)["inputs"]) == ("heap/all", 120)
    code, out, _ = program("evaluate", TEACHER, "--data", "heap", "--split", "test", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["data"] == "heap/test" and 1 <= found["inputs"] < 40
    (tmp_path / "my.yaml").write_text(RECIPE.replace("DATA", "./heap").replace("SOURCE", "./heap"))
    assert program("run", "my.yaml", "--out", "made")[0] == 0
    code, out, _ = program("evaluate", "made", "--json")
    assert json.loads(out)["data_fingerprint"] == found["data_fingerprint"]


@pytest.mark.parametrize("data", ["one.npz", "one/test"])
def test_one_file_judges_and_is_refused_for_training(program, tmp_path: Path, data: str) -> None:
    test = load_images("digits", "test")
    np.savez(tmp_path / "one.npz", x=test.images[:60], y=test.labels[:60])
    pictures(tmp_path / "one/test", count=60)
    (tmp_path / "my.yaml").write_text(RECIPE.replace("DATA", data).replace("SOURCE", "digits"))
    code, _, err = program("run", "my.yaml", "--out", "made")
    assert code == 0, err
    (tmp_path / "my.yaml").write_text(RECIPE.replace("DATA", data).replace("SOURCE", data))
    for command in (("validate", "my.yaml"), ("run", "my.yaml", "--out", "other")):
        code, _, err = program(*command)
        assert code == 2 and "what judges must not train" in err


def test_a_teacher_is_trained_on_pictures(tmp_path: Path) -> None:
    pictures(tmp_path / "mine/train", count=100, names="abcdefghij")
    pictures(tmp_path / "mine/test", count=50, names="abcdefghij", only=5)
    recipe = load_teacher_recipe("digits-convnet")
    quick = recipe.model_copy(
        update={
            "data": str(tmp_path / "mine"),
            "training": recipe.training.model_copy(update={"epochs": 1}),
        }
    )
    _, card = train_teacher(quick, None)
    assert card.classes == tuple("abcdefghij")
    assert card.test_fingerprint == load_images(quick.data, "test").fingerprint
    with pytest.raises(RecipeError, match=r"got num_classes=12 .*, expected 10"):
        train_teacher(quick.model_copy(update={"num_classes": 12}), None)


def test_a_teacher_may_have_more_classes_than_unnamed_labels(tmp_path: Path) -> None:
    test = load_images("digits", "test")
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", x=test.images[:40], y=test.labels[:40] % 9)
    recipe = load_teacher_recipe("digits-convnet")
    training = recipe.training.model_copy(update={"epochs": 1})
    quick = recipe.model_copy(update={"data": str(tmp_path), "training": training})
    _, card = train_teacher(quick, None)
    assert card.classes == tuple("0123456789")
    with pytest.raises(RecipeError, match=r"got num_classes=8 .*, expected 9"):
        train_teacher(quick.model_copy(update={"num_classes": 8}), None)


def test_distorted_examples_are_the_same_for_everybody() -> None:
    examples = load_examples("digits", SPEC)
    assert distorted(examples, SPEC, ()) is examples
    inverted, labels = distorted(examples, SPEC, ["invert"])
    # Bright is dark, at whole grey levels.
    expected = 1 - SPEC.denormalize(examples[0]).mul(255).round() / 255
    torch.testing.assert_close(SPEC.denormalize(inverted), expected, rtol=0, atol=1e-6)
    assert torch.equal(labels, examples[1])
    first, second = (distorted(examples, SPEC, ["rotate|tint", "noise"])[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_recipe_judges_teacher_and_student_under_its_shift(tmp_path: Path) -> None:
    given = ["config.rounds=1", "config.iterations=2", "trainer.device=cpu"]
    plain = run_recipe(load_recipe("kd", overrides=given), tmp_path / "plain", report=False)
    recipe = load_recipe("kd", overrides=[*given, "data_shift=[invert]"])
    shifted = run_recipe(recipe, tmp_path / "shifted", report=False)
    assert plain["teacher"]["score"] > 0.9
    assert shifted["teacher"]["score"] < 0.3
    # `vestige evaluate` judges as the run did, and elsewhere as it is told.
    again = evaluate(str(tmp_path / "shifted"))
    assert again.scores["accuracy"] == shifted["student"]["score"]
    elsewhere = evaluate(str(tmp_path / "shifted"), data="digits")
    # The same student: what judges a run does not train it.
    assert elsewhere.scores["accuracy"] == plain["student"]["score"]
