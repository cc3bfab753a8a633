"""`vestige evaluate` and `vestige export` as their users meet them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from vestige.cli import models
from vestige.data.image import load_images
from vestige.recipes.evaluate import Judged
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import run_recipe
from vestige.recipes.teacher import train_teacher
from vestige.recipes.teacher_schema import load_teacher_recipe
from vestige.training.pictures import save_png

TEACHER = "builtin:digits-convnet"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "made"
    recipe = load_recipe("kd", preset="smoke", overrides=["trainer.device=cpu"])
    run_recipe(recipe, folder, report=False)
    return folder


def save_npz(path: Path, images, labels, classes) -> None:
    np.savez(path, x=images, y=np.asarray(labels, np.int64), classes=np.array(classes))


def test_a_run_is_judged_as_it_was(program, run):
    code, out, _ = program("evaluate", str(run), "--json")
    assert code == 0
    found = json.loads(out)
    summary = json.loads((run / "summary.json").read_text())
    assert found["scores"]["accuracy"] == summary["student"]["score"]
    assert found["details"]["teacher"]["accuracy"] == summary["teacher"]["score"]
    assert (found["data"], found["inputs"], found["teacher"]) == ("digits/test", 500, TEACHER)
    code, out, _ = program("evaluate", str(run))
    assert code == 0
    share = found["details"]["agreement"]["share"]
    assert f"agrees with its teacher ({TEACHER}, accuracy 99.40%) on {share:.2%}" in out
    assert f"accuracy {found['scores']['accuracy']:.2%}" in out


def test_what_a_task_tells_is_shown_by_the_keys_that_are_there(monkeypatch, capsys):
    def shown(metric: str, scores: dict, details: dict) -> str:
        found = Judged("a", 1, "f" * 64, "d/test", "e", 4, ("[b]",), metric, scores, details, "t")
        models._show(found)
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "120")
    dense = {
        "inputs": 4,
        "pixels": 64_000,
        "pixels_per_class": [60_000, 4_000, 0],
        "student": {"miou": 0.625, "pixel_accuracy": 0.75, "per_class": [0.75, 0.5, None]},
        "teacher": {"miou": 0.875, "per_class": [0.9, 0.85, None]},
        "agreement": {"share": 0.8125},
    }
    out = shown("miou", {"miou": 0.625, "pixel_accuracy": 0.75, "loss": 0.5}, dense)
    assert "4 inputs: mIoU 62.50%, pixel accuracy 75.00%, loss 0.5000" in out
    assert "agrees with its teacher (t, mIoU 87.50%) on 81.25% of the pixels" in out
    for said in ("pixels", "IoU", "[b]", "60,000", "75.0%", "90.0%"):
        assert said in out
    assert "accuracy" not in out.replace("pixel accuracy", "")
    # Of a task that nobody here knows.
    assert "score 0.5000" in shown("score", {"score": 0.5}, {"anything": [1]})
    assert "class" not in shown("score", {"score": 0.5}, {"student": {"per_class": [None]}})
    assert "on 50.00%" in shown("score", {"score": 0.5}, {"agreement": {"share": 0.5}})


def test_weights_and_cards_name_the_same_network(program, run):
    prints = set()
    for target in (run, run / "student.json", run / "student.safetensors"):
        code, out, _ = program("evaluate", str(target), "--data", "digits", "--json")
        assert code == 0
        prints.add(json.loads(out)["fingerprint"])
    assert len(prints) == 1


def test_another_split_is_another_score(program, run):
    code, out, _ = program("evaluate", str(run), "--split", "select", "--json")
    assert code == 0
    assert (json.loads(out)["data"], json.loads(out)["inputs"]) == ("digits/select", 129)


def test_a_teachers_card_as_train_teacher_writes_it(program, tmp_path):
    recipe = load_teacher_recipe("digits-convnet")
    quick = recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": 1})})
    _, card = train_teacher(quick, tmp_path)
    for name in ("digits-convnet.json", "digits-convnet.safetensors"):
        code, out, _ = program("evaluate", name, "--data", "digits", "--json")
        assert code == 0
        assert json.loads(out)["scores"]["accuracy"] == card.accuracy


def test_a_mapping_says_what_no_card_says(program, run):
    mapping = (
        f"{{model: convnet, weights: {run / 'student.safetensors'}, num_classes: 10, "
        "input: {channels: 1, height: 16, width: 16, mean: [0.3058], std: [0.3193]}, args: ARGS}"
    )
    card = json.loads((run / "student.json").read_text())
    mapping = mapping.replace("convnet", card["model"]).replace("ARGS", json.dumps(card["args"]))
    code, out, _ = program("evaluate", mapping, "--data", "digits", "--json")
    assert code == 0
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads(out)["scores"]["accuracy"] == summary["student"]["score"]


def test_a_file_of_ones_own(program, tmp_path):
    test = load_images("digits", "test")
    save_npz(tmp_path / "mine.npz", test.images[:60], test.labels[:60], test.classes)
    code, out, _ = program("evaluate", TEACHER, "--data", "mine.npz", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["data"], found["inputs"]) == ("mine/test", 60)
    assert found["scores"]["accuracy"] > 0.95


def test_classes_are_matched_by_name(program, tmp_path):
    test = load_images("digits", "test")
    save_npz(tmp_path / "turned.npz", test.images, 9 - test.labels, test.classes[::-1])
    few = test.labels < 3
    save_npz(tmp_path / "few.npz", test.images[few], test.labels[few], test.classes[:3])
    for name, inputs in (("turned.npz", 500), ("few.npz", 150)):
        code, out, err = program("evaluate", TEACHER, "--data", name, "--json")
        assert (code, json.loads(out)["inputs"]) == (0, inputs), err
        assert json.loads(out)["scores"]["accuracy"] > 0.99


def test_pictures_in_class_folders(program, tmp_path):
    test = load_images("digits", "test")
    for index in range(0, 100):
        folder = tmp_path / "mine" / "test" / str(test.labels[index])
        folder.mkdir(parents=True, exist_ok=True)
        picture = test.images[index]
        if index % 2:  # in colour
            picture = np.stack([picture] * 3, axis=2)
        if index == 7:  # of another size
            picture = picture.repeat(2, 0).repeat(2, 1)
        save_png(picture, folder / f"{index}.png")
    code, out, _ = program("evaluate", TEACHER, "--data", "mine", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["inputs"] == 100
    assert found["scores"]["accuracy"] > 0.95
    # Without a folder of the split's name the pictures lie in the folder itself.
    code, again, _ = program("evaluate", TEACHER, "--data", "mine/test", "--json")
    assert json.loads(again)["scores"] == found["scores"]
    (tmp_path / "mine/test/0/broken.png").write_bytes(b"no picture")
    code, _, err = program("evaluate", TEACHER, "--data", "mine")
    assert code == 2
    assert "broken.png, which cannot be read as a picture" in err


def test_classes_with_other_names_are_compared_by_number_and_that_is_said(
    program, tmp_path, caplog
):
    test = load_images("digits", "test")
    save_npz(tmp_path / "named.npz", test.images, test.labels, [f"n{i}" for i in range(10)])
    code, out, _ = program("evaluate", TEACHER, "--data", "named.npz")
    assert code == 0
    assert "accuracy 99.40%" in out
    assert "compared by their numbers" in caplog.text


def test_classes_that_do_not_fit_are_refused(program, tmp_path):
    test = load_images("digits", "test")
    few = test.labels < 3
    save_npz(tmp_path / "three.npz", test.images[few], test.labels[few], ["a", "b", "c"])
    code, _, err = program("evaluate", TEACHER, "--data", "three.npz")
    assert code == 2
    assert "got 3 classes in three (a, b, c), expected the 10 of the network (0, 1, 2" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TEACHER,), "names no set to judge on"),
        ((TEACHER, "--data", "nothing"), "data set 'nothing'"),
        ((TEACHER, "--data", "nothing.npz"), "got no file nothing.npz"),
        (("builtin:nothing", "--data", "digits"), "built-in teacher 'nothing'"),
        (("nowhere", "--data", "digits"), "got teacher 'nowhere'"),
        (("a.safetensors", "--data", "digits"), "there is no file"),
        (("a.pt", "--data", "digits"), "do not say what network"),
        (("{a: [}", "--data", "digits"), "no YAML mapping"),
        (("{factory: 'torch.nn:Identity'}", "--data", "digits"), "'input' and 'num_classes'"),
        ((".", "--data", "digits"), "holds no student.json"),
    ],
)
def test_mistakes_exit_2_with_a_message(program, arguments, message):
    code, _, err = program("evaluate", *arguments)
    assert code == 2
    assert message in err


def test_a_run_from_python_has_no_teacher_to_agree_with(program, run, tmp_path):
    for name in ("student.json", "student.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / "recipe.yaml").write_text("method: kd\nconfig: {}\nseed: 0\n")
    code, out, _ = program("evaluate", str(tmp_path), "--data", "digits", "--json")
    assert code == 0
    assert json.loads(out)["details"]["agreement"] is None


def test_export_says_what_it_wrote(program, run, tmp_path):
    code, out, _ = program("export", str(run), "--to", "safetensors", "--out", "a")
    assert code == 0
    assert out.strip() == "a/student.safetensors, with student.json"
    code, out, _ = program("export", str(run), "--to", "hub", "--out", "b")
    assert code == 0
    assert "hf upload ORG/NAME b" in out
    assert (tmp_path / "b/README.md").is_file()


def test_export_to_onnx_prints_the_difference(program, run):
    pytest.importorskip("onnxscript", reason="needs the extra [export]")
    code, out, _ = program("export", str(run), "--to", "onnx", "--normalize", "--out", "a")
    assert code == 0
    assert re.search(r"a/student\.onnx: opset 18, .* by at most \d", out)


def test_export_without_its_packages_names_the_command(program, run, monkeypatch):
    monkeypatch.setattr("vestige.training.export.onnx_file.find_spec", lambda name: None)
    code, _, err = program("export", str(run), "--to", "onnx")
    assert code == 2
    assert "pip install 'vestige[export]'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--to", "hub"), "holds no student.json"),
        (("nowhere", "--to", "tflite"), "'tflite' is not one of"),
        (("RUN", "--to", "hub", "--normalize"), "only ONNX"),
        (("RUN", "--to", "onnx", "--factory", "no_such:thing"), "got factory 'no_such:thing'"),
    ],
)
def test_mistakes_of_an_export_exit_2(program, run, arguments, message):
    if "--factory" in arguments:
        pytest.importorskip("onnxscript", reason="needs the extra [export]")
    code, _, err = program("export", *(str(run) if one == "RUN" else one for one in arguments))
    assert code == 2
    assert message in err


def test_a_spent_budget_exits_1_and_a_larger_one_goes_on(program, tmp_path):
    asked = ("run", "kd", "--preset", "smoke", "--set", "trainer.device=cpu", "--out", "x")
    hidden = (*asked, "--set", "access=scores", "--set")
    code, _, err = program(*hidden, "query_budget=40")
    assert code == 1
    assert re.search(r"of 40 are used; .* The last checkpoint, at step \d+, is kept", err)
    assert list((tmp_path / "x/checkpoints").glob("*.safetensors"))
    assert not (tmp_path / "x/summary.json").exists()
    code, _, err = program(*hidden, "query_budget=1000000", "--resume")
    assert code == 0, err
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert summary["teacher_queries"] == summary["steps"] * 16
