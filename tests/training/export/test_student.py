import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import vestige
from vestige.core.types import InputSpec
from vestige.errors import ExportError, RecipeError, TeacherError
from vestige.models.factory import build_model
from vestige.recipes.evaluate import evaluate
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import run_recipe
from vestige.teachers.loading import fingerprint, load_teacher
from vestige.training.export.student import export
from vestige.training.files import tensors_to_bytes, write_bytes, write_json

SPEC = InputSpec.image(1, 16, 16, mean=(0.3,), std=(0.2,))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "made"
    recipe = load_recipe("kd", preset="smoke", overrides=["trainer.device=cpu"])
    run_recipe(recipe, folder, command="vestige run kd --preset smoke", report=False)
    return folder


@pytest.fixture
def handed(tmp_path: Path, tiny_student: nn.Sequential) -> Path:
    """As a run from Python leaves it."""
    folder = tmp_path / "handed"
    write_bytes(folder / "student.safetensors", tensors_to_bytes(tiny_student.state_dict()))
    size = {"channels": 1, "height": 8, "width": 8, "mean": [], "std": []}
    card = {"class": "torch.nn:Sequential", "input": size, "num_classes": 3}
    write_json(folder / "student.json", {**card, "weights": "student.safetensors"})
    return folder


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript", reason="needs the extra [export]")
    return pytest.importorskip("onnx", reason="needs the extra [export]")


def answers(onnx, path: Path, **inputs: torch.Tensor) -> torch.Tensor:
    from onnx.reference import ReferenceEvaluator

    given = {name: value.numpy() for name, value in inputs.items()}
    return torch.from_numpy(ReferenceEvaluator(onnx.load(path)).run(None, given)[0])


def test_safetensors_are_a_student_that_can_teach(run: Path, tmp_path: Path) -> None:
    done = export(run, to="safetensors", out=tmp_path / "out")
    assert done.path == tmp_path / "out" / "student.safetensors"
    original = load_teacher(run / "student.json")
    assert fingerprint(load_teacher(tmp_path / "out" / "student.json")) == fingerprint(original)
    card = json.loads((tmp_path / "out" / "student.json").read_text())
    assert card == json.loads((run / "student.json").read_text())


def test_the_default_folder_is_beside_the_run_and_writing_again_is_the_same(run: Path) -> None:
    path = export(run, to="safetensors").path
    assert path == run / "export" / "student.safetensors"
    before = path.read_bytes()
    assert export(run, to="safetensors").path.read_bytes() == before


def test_onnx_answers_as_torch_for_any_batch_size(onnx, run: Path, tmp_path: Path) -> None:
    done = export(run, to="onnx", out=tmp_path)
    model = onnx.load(done.path)
    onnx.checker.check_model(model)
    assert (done.opset, model.opset_import[0].version) == (18, 18)
    student = load_teacher(run / "student.json")
    shape = [1, 16, 16]
    for rows in (1, 5):
        inputs = torch.randn(rows, *shape)
        expected = student(inputs)
        found = answers(onnx, done.path, inputs=inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert done.largest_difference < 1e-4
    notes = {entry.key: entry.value for entry in model.metadata_props}
    card = json.loads((run / "student.json").read_text())
    assert notes["mean"] == str(card["input"]["mean"])
    assert (notes["normalisation"], notes["num_classes"]) == ("outside", "10")
    assert notes["classes"].splitlines() == [str(digit) for digit in range(10)]


def test_normalisation_can_be_inside(onnx, tmp_path: Path) -> None:
    network = build_model("convnet", SPEC, 4, widths=[2, 3, 4])
    done = export(network, to="onnx", out=tmp_path, spec=SPEC, num_classes=4, normalize=True)
    images = torch.rand(3, *SPEC.shape)
    expected = network.eval()(SPEC.normalize(images))
    torch.testing.assert_close(
        answers(onnx, done.path, images=images), expected, rtol=1e-4, atol=1e-4
    )
    notes = {entry.key: entry.value for entry in onnx.load(done.path).metadata_props}
    assert (notes["normalisation"], notes["input"]) == ("inside", "images in [0, 1]")


def test_exporting_changes_nothing_of_the_network(onnx, tmp_path: Path) -> None:
    network = build_model("convnet", SPEC, 4, widths=[2, 3, 4]).train()
    before = fingerprint(network)
    export(network, to="onnx", out=tmp_path, spec=SPEC, num_classes=4)
    assert fingerprint(network) == before
    assert all(module.training for module in network.modules())


def test_networks_that_answer_with_more_than_logits(onnx, tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, inputs):
            return {"logits": self.inner(inputs), "features": inputs}

    spec, network = InputSpec("vector", (4,)), Two()
    done = export(network, to="onnx", out=tmp_path, spec=spec, num_classes=3)
    inputs = torch.randn(2, 4)
    torch.testing.assert_close(
        answers(onnx, done.path, inputs=inputs), network.inner(inputs), rtol=1e-4, atol=1e-4
    )


class Branches(nn.Module):
    def forward(self, inputs):
        return inputs if inputs.sum() > 0 else -inputs


class Draws(nn.Module):
    def forward(self, inputs):
        return inputs + torch.randn_like(inputs)


@pytest.mark.parametrize(
    ("network", "message"),
    [(Branches(), "torch cannot express Branches"), (Draws(), "differ from torch's by up to")],
)
def test_what_cannot_be_exported_is_told_and_not_written(
    onnx, tmp_path: Path, network: nn.Module, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(network, to="onnx", out=tmp_path, spec=InputSpec("vector", (4,)), num_classes=4)
    assert list(tmp_path.iterdir()) == []


def test_a_student_that_was_handed_in(onnx, handed: Path, tiny_student: nn.Sequential) -> None:
    assert export(handed, to="safetensors").path.is_file()
    with pytest.raises(TeacherError, match=r"--factory .* vestige\.export\(report\.student"):
        export(handed, to="onnx")
    fresh = copy.deepcopy(tiny_student)
    with torch.no_grad():
        fresh[0].weight.zero_()
    before = fingerprint(fresh)
    done = export(handed, to="onnx", network=fresh)
    assert fingerprint(fresh) == before
    inputs = torch.randn(2, 1, 8, 8)
    expected = tiny_student.eval()(inputs)
    torch.testing.assert_close(
        answers(onnx, done.path, inputs=inputs), expected, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(TeacherError, match="do not fit Linear"):
        export(handed, to="onnx", network=nn.Linear(2, 2))


def test_a_folder_for_the_hub_says_what_the_student_is(run: Path, tmp_path: Path) -> None:
    folder = export(run, to="hub", out=tmp_path / "hub").path
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "model.safetensors", "student.json"} <= names
    assert ("samples.png" in names) == (run / "samples.png").is_file()
    student = load_teacher(folder / "student.json")
    assert fingerprint(student) == fingerprint(load_teacher(run / "student.json"))
    page = (folder / "README.md").read_text()
    _, front, text = page.split("---\n", 2)
    summary = json.loads((run / "summary.json").read_text())
    record = json.loads((run / "run.json").read_text())
    values = yaml.safe_load(front)
    assert values["pipeline_tag"] == "image-classification"
    assert "kd" in values["tags"]
    assert "data-free" in values["tags"]  # it learned from noise
    assert "it learned from the teacher alone" in text
    (result,) = values["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": summary["student"]["score"]}]
    for said in (
        "builtin:digits-convnet",
        record["teacher_fingerprint"],
        record["teacher_trained_on"],
        f"**{summary['student']['score']:.4f}**",
        f"{summary['student']['best_score']:.4f} |",
        "digits/test",
        "vestige run kd --preset smoke",
        f"Seed: {summary['seed']}",
        summary["versions"]["torch"],
    ):
        assert said in text, said
    for item in summary["real_data"]:
        assert f"| {item['name']} | {item['origin']} |" in text


def test_real_data_that_a_student_learned_from_is_not_hidden(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "real")
    path = tmp_path / "real" / "summary.json"
    summary = json.loads(path.read_text())
    read = {**summary["real_data"][0], "purpose": "distillation", "name": "digits/train"}
    path.write_text(json.dumps({**summary, "real_data": [*summary["real_data"], read]}))
    folder = export(tmp_path / "real", to="hub").path
    page = (folder / "README.md").read_text()
    assert "data-free" not in page and "the teacher alone" not in page
    assert "It learned from the teacher's answers to real data" in page
    assert "| digits/train | real | evaluation | distillation |" in page


def test_the_code_on_the_card_runs(run: Path, tmp_path: Path, monkeypatch) -> None:
    folder = export(run, to="hub", out=tmp_path / "hub").path
    monkeypatch.chdir(folder)
    blocks = (folder / "README.md").read_text().split("```python\n")[1:]
    made = []
    for block in blocks:
        names: dict[str, object] = {}
        exec(block.split("```")[0], names)
        made.append(fingerprint(names["network"]))
    assert made == [fingerprint(load_teacher(run / "student.json"))] * 2


def test_a_handed_in_student_for_the_hub(handed: Path) -> None:
    folder = export(handed, to="hub").path
    page = (folder / "README.md").read_text()
    assert "handed in" in page and "your_package.module:make_network" in page
    assert "The run was not judged on real data." in page
    assert "is not known" in page and "data-free" not in page
    assert set(load_file(folder / "model.safetensors")) == set(
        load_file(handed / "student.safetensors")
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"to": "tflite"}, "expected one of safetensors, onnx, hub"),
        ({"to": "hub", "normalize": True}, "only ONNX"),
        ({"to": "safetensors", "factory": "a:b"}, "only ONNX of a run folder"),
        ({"to": "safetensors", "spec": SPEC}, "a run folder knows its own"),
        ({"to": "onnx", "network": nn.Linear(1, 1), "factory": "a:b"}, "expected one of them"),
    ],
)
def test_arguments_without_effect_are_refused(handed: Path, given, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        export(handed, **given)


def test_what_is_no_run_is_told(tmp_path: Path, handed: Path) -> None:
    with pytest.raises(RecipeError, match=r"holds no student\.json"):
        export(tmp_path / "nothing", to="safetensors")
    with pytest.raises(RecipeError, match="is the run folder itself"):
        export(handed, to="safetensors", out=handed)
    with pytest.raises(RecipeError, match="out, spec and num_classes"):
        export(nn.Linear(1, 1), to="safetensors")
    with pytest.raises(RecipeError, match="got a network; call"):
        export(nn.Linear(1, 1), to="hub")


def test_it_is_a_public_name() -> None:
    assert vestige.export is export


def test_an_exported_student_scores_what_its_run_scored(run: Path, tmp_path: Path) -> None:
    path = export(run, to="safetensors", out=tmp_path).path
    score = json.loads((run / "summary.json").read_text())["student"]["score"]
    assert evaluate(str(path), data="digits").scores["accuracy"] == score
