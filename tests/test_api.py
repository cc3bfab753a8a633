"""`vestige.distill`: whatever network, whatever task, and a clear word where it cannot work."""

import copy
import hashlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vestige
from vestige.core.types import InputSpec
from vestige.errors import (
    AccessError,
    CheckpointError,
    DataError,
    RecipeError,
    ShapeError,
    TeacherError,
)
from vestige.recipes.catalog import METHODS
from vestige.sources.noise import NoiseSource
from vestige.teachers.black_box import BlackBoxTeacher
from vestige.training.tracking import Event

SMALL = {
    "rounds": 2,
    "iterations": 2,
    "student_steps": 2,
    "batch_size": 4,
    "generator_width": 4,
    "latent_dim": 8,
    "student_optimizer": "adam",
    "student_lr": 1e-3,
}
STEPS = 2 * 2 * (2 + 1)
SPEC = InputSpec.image(1, 8, 8)


class Killed(BaseException):
    """Not an Exception, so that nothing on the way may swallow it."""


class Net(nn.Module):
    """A user's network, with names that no library would guess and an answer of any form."""

    def __init__(self, channels: int = 1, classes: int = 3, width: int = 6, form: str = "tensor"):
        super().__init__()
        self.form = form
        self.look = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.say = nn.Linear(width, classes)

    def forward(self, images):
        seen = self.look(images).mean((2, 3))
        said = self.say(seen)
        return {
            "tensor": said,
            "tuple": (said, seen),
            "object": SimpleNamespace(logits=said, hidden=seen),
            "mapping": {"logits": said},
        }[self.form]


@pytest.fixture
def nets() -> tuple[Net, Net]:
    return Net(width=8), Net(width=4)


def distill(teacher: nn.Module, student: nn.Module, **given):
    """`vestige.distill` at the smallest size."""
    config = {**SMALL, **given.pop("config", {})}
    values = {"spec": SPEC, "num_classes": 3, "device": "cpu", **given}
    return vestige.distill(teacher, student, config=config, **values)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def differing(first: dict, second: dict) -> list[str]:
    return [name for name in first if not torch.equal(first[name], second[name])]


# Whatever network


@pytest.mark.parametrize("form", ["tensor", "tuple", "object", "mapping"])
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_any_form_of_answer_trains_the_same_student(form, who, nets):
    teacher, student = nets
    plain = copy.deepcopy(student)
    distill(copy.deepcopy(teacher), plain)
    (teacher if who == "teacher" else student).form = form
    distill(teacher, student)
    assert differing(state(student), state(plain)) == []


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_grey_and_colour_few_and_many_classes_small_and_large(channels, classes, size):
    spec = InputSpec.image(channels, size, size, mean=[0.5] * channels, std=[0.2] * channels)
    teacher, student = Net(channels, classes, 8), Net(channels, classes, 4)
    before = state(student)
    report = distill(teacher, student, spec=spec, num_classes=classes)
    assert report.summary["steps"] == STEPS
    assert set(differing(before, state(student))) == set(before)
    images = report.source(torch.randn(5, SMALL["latent_dim"]))
    assert images.shape == (5, channels, size, size)


def test_sides_may_differ(nets):
    report = distill(*nets, spec=InputSpec.image(1, 8, 16))
    assert report.source(torch.randn(2, 8)).shape == (2, 1, 8, 16)


def test_the_teacher_stays_as_it_was_and_the_student_is_the_one_handed_in(nets):
    teacher, student = nets
    before = state(teacher)
    report = distill(teacher.train(), student)
    assert differing(before, state(teacher)) == []
    assert report.student is student
    assert not any(module.training for module in (*student.modules(), *teacher.modules()))
    assert all(weight.requires_grad for weight in student.parameters())
    assert not any(weight.requires_grad for weight in teacher.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def test_batchnorm_that_the_user_froze_stays_frozen(nets):
    teacher, student = nets
    norm = student.look[1]
    norm.eval().requires_grad_(False)
    before = state(student)
    distill(teacher, student)
    changed = differing(before, state(student))
    assert not [name for name in changed if name.startswith("look.1.")]
    assert {"look.0.weight", "say.weight"} <= set(changed)


def test_frozen_layers_that_are_no_batchnorm_keep_their_weights(nets):
    teacher, student = nets
    student.look[0].requires_grad_(False)
    before = state(student)
    distill(teacher, student)
    assert not [n for n in differing(before, state(student)) if n.startswith("look.0.")]


def test_the_global_random_state_of_the_caller_does_not_matter(nets):
    teacher, student = nets
    other = copy.deepcopy(student)
    distill(teacher, student)
    torch.manual_seed(99)
    distill(teacher, other)
    assert differing(state(student), state(other)) == []
    third = copy.deepcopy(nets[1])
    distill(teacher, third, seed=1)
    assert differing(state(student), state(third))


# Judging


def test_a_tuple_judges_and_chooses_nothing(nets):
    teacher, student = nets
    inputs, labels = torch.randn(50, 1, 8, 8), torch.randint(3, (50,))
    blind = copy.deepcopy(student)
    report = distill(teacher, student, evaluate=(inputs, labels))
    distill(teacher, blind)
    assert differing(state(student), state(blind)) == []
    with torch.no_grad():
        right = (student(inputs).argmax(1) == labels).double().mean().item()
        known = (teacher(inputs).argmax(1) == labels).double().mean().item()
    assert report.summary["student"]["score"] == pytest.approx(right)
    assert report.summary["teacher"]["score"] == pytest.approx(known)
    assert [item["purpose"] for item in report.summary["real_data"]] == ["evaluation"]
    assert len(report.outcome.scores) == SMALL["rounds"]


def test_a_callable_judges(nets):
    asked = []

    def judge(model):
        asked.append(model)
        return {"accuracy": 0.5 if model is nets[1] else 0.75, "other": 1.0}

    report = distill(*nets, evaluate=judge)
    assert report.summary["student"]["score"] == 0.5
    assert report.summary["teacher"]["score"] == 0.75
    assert {id(model) for model in asked} == {id(nets[0]), id(nets[1])}
    with pytest.raises(RecipeError, match=r"f1.*, expected a mapping with 'accuracy'"):
        distill(*nets, evaluate=lambda model: {"f1": 1.0})


def test_nobody_needs_to_judge(nets):
    report = distill(*nets)
    assert report.summary["student"]["score"] is report.summary["teacher"]["score"] is None
    assert report.summary["real_data"] == []


@pytest.mark.parametrize("count", [3, 5])
def test_labels_must_fit_the_inputs(count, nets):
    with pytest.raises(ShapeError, match="4 inputs"):
        distill(*nets, evaluate=(torch.randn(4, 1, 8, 8), torch.zeros(count, dtype=torch.long)))


# Folders, resuming, budgets


def test_nothing_is_written_without_a_folder(nets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    distill(*nets)
    assert list(tmp_path.iterdir()) == []


def test_the_report_and_the_folder_say_the_same(nets, tmp_path):
    report = distill(*nets, out=tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", "student.safetensors"),
        *("student.json", "samples.png", "samples-over-time.png", "report.html", "summary.json"),
        "samples-over-time.png",
    }
    stored = json.loads((tmp_path / "run/summary.json").read_text())
    assert stored == json.loads(json.dumps(report.summary))
    from safetensors.torch import load_file

    assert differing(state(nets[1]), load_file(tmp_path / "run/student.safetensors")) == []
    assert isinstance(report, vestige.DistillReport)
    assert (report.outcome.steps, report.outcome.complete) == (STEPS, True)
    assert isinstance(report.source, nn.Module) and report.pool is None
    with pytest.raises(RecipeError, match="is not empty; add --resume"):
        distill(*nets, out=tmp_path / "run")


def test_resuming_ends_where_the_uninterrupted_run_does(nets, tmp_path):
    teacher, student = nets
    whole, resumed = copy.deepcopy(student), copy.deepcopy(student)
    distill(teacher, whole, out=tmp_path / "whole")

    def kill(event: Event) -> None:
        if event.kind == "round":
            raise Killed

    with pytest.raises(Killed):
        distill(teacher, student, out=tmp_path / "run", callbacks=[kill])
    report = distill(teacher, resumed, out=tmp_path / "run", resume=True)
    assert differing(state(whole), state(resumed)) == []
    assert report.summary["steps"] == STEPS


def test_other_settings_are_not_resumed_and_the_folder_stays(nets, tmp_path):
    out = tmp_path / "run"
    distill(*nets, out=out)

    def digests() -> dict[Path, str]:
        return {
            p: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.rglob("*") if p.is_file()
        }

    before = digests()
    with pytest.raises(CheckpointError, match="config"):
        distill(*nets, out=out, resume=True, config={"generator_lr": 1e-4})
    with pytest.raises(CheckpointError, match="teacher_fingerprint"):
        distill(Net(width=8), nets[1], out=out, resume=True)
    assert digests() == before


def test_a_budget_of_steps_stops_at_the_end_of_a_round(nets):
    report = distill(*nets, budget={"steps": 1}, config={"rounds": 5})
    assert report.summary["steps"] == STEPS // 2
    assert (report.summary["complete"], report.outcome.complete) == (False, False)


def test_a_budget_of_minutes_stops_and_says_how_many_rounds_fit(nets):
    told = []
    report = distill(
        *nets,
        budget={"minutes": 1e-4},
        config={"rounds": 500},
        callbacks=[lambda e: told.append(e.data["message"]) if e.kind == "warning" else None],
    )
    assert 0 < report.summary["steps"] < 500 * STEPS // 2
    assert not report.outcome.complete
    assert any("is enough for about" in message for message in told)


@pytest.mark.parametrize(
    ("budget", "named"),
    [
        ({"hours": 1}, r"budget: got \['hours'\], expected 'minutes' and 'steps'"),
        ({"minutes": -1}, "budget.minutes: got -1"),
        ({"steps": 0}, "budget.max_steps: got 0"),
        ({"steps": 1.5}, "budget.max_steps: got 1.5"),
        ({"steps": "many"}, "budget.max_steps: got 'many'"),
    ],
)
def test_a_wrong_budget_is_named(budget, named, nets):
    with pytest.raises(RecipeError, match=named):
        distill(*nets, budget=budget)


# Sources


def test_a_tensor_is_foreign_data_and_is_recorded(nets):
    config = {k: SMALL[k] for k in ("rounds", "iterations", "batch_size")}
    report = vestige.distill(
        *nets,
        method="kd",
        spec=SPEC,
        num_classes=3,
        config=config,
        sources={"inputs": torch.randn(20, 1, 8, 8)},
        device="cpu",
    )
    (read,) = report.summary["real_data"]
    assert (read["origin"], read["purpose"], read["images"]) == ("foreign", "distillation", 20)
    assert report.source is None


@pytest.mark.parametrize("form", ["array", "path", "folder"])
def test_images_are_taken_as_they_come(nets, form, tmp_path, monkeypatch):
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    images = np.random.RandomState(0).randint(0, 256, (20, 11, 9), dtype=np.uint8)
    (tmp_path / "web").mkdir()
    np.save(tmp_path / "web.npy", images)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "web" / f"{number}.png")
    given = {"array": images, "path": str(tmp_path / "web.npy"), "folder": tmp_path / "web"}

    def go(source, **more):
        return vestige.distill(
            *nets,
            method="kd",
            spec=SPEC,
            num_classes=3,
            config={"rounds": 2, "iterations": 1, "batch_size": 4},
            sources={"inputs": source},
            device="cpu",
            out=tmp_path / "out",
            **more,
        )

    (read,) = go(given[form]).summary["real_data"]
    assert (read["origin"], read["purpose"], read["images"]) == ("foreign", "distillation", 20)
    assert len(read["fingerprint"]) == 64
    # What a run was started with is known by its content.
    with pytest.raises(CheckpointError, match=r"other settings \(sources\)"):
        go(255 - images, resume=True)


def test_what_is_no_source_is_refused(nets):
    kd = {"method": "kd", "spec": SPEC, "num_classes": 3, "device": "cpu"}
    with pytest.raises(
        RecipeError, match=r"sources\.inputs: got list, expected a tensor of inputs"
    ):
        vestige.distill(*nets, **kd, sources={"inputs": [1, 2]})
    with pytest.raises(DataError, match=r"got float32 values of shape \(2, 8, 8\) in inputs"):
        vestige.distill(*nets, **kd, sources={"inputs": np.zeros((2, 8, 8), dtype=np.float32)})
    with pytest.raises(DataError, match=r"got no folder .*nowhere"):
        vestige.distill(*nets, **kd, sources={"inputs": "./nowhere"})


def test_noise_is_no_data(nets):
    report = vestige.distill(
        *nets,
        method="kd",
        spec=SPEC,
        num_classes=3,
        config={"rounds": 1, "iterations": 1, "batch_size": 2},
        sources={"inputs": NoiseSource(SPEC)},
        device="cpu",
    )
    assert report.summary["real_data"] == []
    assert report.summary["teacher_queries"] == 2


def test_missing_and_unknown_sources_are_named(nets):
    kd = {"method": "kd", "spec": SPEC, "num_classes": 3, "device": "cpu"}
    with pytest.raises(RecipeError, match=r"'kd' needs the sources \['inputs'\]"):
        vestige.distill(*nets, **kd)
    with pytest.raises(RecipeError, match=r"sources: got \['x'\], 'kd' takes \['inputs'\]"):
        vestige.distill(*nets, **kd, sources={"x": torch.zeros(2, 1, 8, 8)})
    with pytest.raises(RecipeError, match=r"sources: got \['inputs'\], 'dfad' takes none"):
        distill(*nets, sources={"inputs": torch.zeros(2, 1, 8, 8)})


# What cannot work


def test_a_student_that_is_the_teacher_is_refused(nets):
    teacher, student = nets
    with pytest.raises(TeacherError, match="share weights"):
        distill(teacher, teacher)
    student.say.weight = nn.Parameter(torch.randn(3, 4))
    shared = Net(width=4)
    shared.say.weight = student.say.weight
    with pytest.raises(TeacherError, match="share weights"):
        distill(shared, student)
    assert all(weight.requires_grad for weight in (*teacher.parameters(), *student.parameters()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["say.weight", "look.1.running_var"])
def test_a_teacher_with_nan_is_refused_with_the_name_of_the_tensor(value, where, nets):
    nets[0].state_dict()[where].view(-1)[0] = value
    with pytest.raises(TeacherError, match=f"got 1 NaN or infinite values of .* in '{where}'"):
        distill(*nets)


@pytest.mark.parametrize("who", [0, 1])
def test_numbers_of_classes_must_agree(who, nets):
    wrong = list(nets)
    wrong[who] = Net(classes=4)
    with pytest.raises(ShapeError, match=r"got logits of shape \(2, 4\).*expected \(2, 3\)"):
        distill(*wrong)


@pytest.mark.parametrize("who", [0, 1])
def test_inputs_must_fit(who, nets):
    wrong = list(nets)
    wrong[who] = Net(channels=3)
    with pytest.raises(ShapeError, match=r"Net cannot take inputs of shape \(1, 8, 8\)"):
        distill(*wrong)


def test_a_teacher_without_batchnorm_cannot_give_its_statistics(nets):
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    distill(bare, copy.deepcopy(nets[1]))
    with pytest.raises(TeacherError, match="BatchNorm"):
        distill(bare, nets[1], config={"bn_weight": 1.0})


def test_an_answer_without_logits_is_named(nets):
    class Odd(nn.Module):
        def forward(self, inputs):
            return "a cat"

    with pytest.raises(ShapeError, match="a forward returned str"):
        distill(Odd(), nets[1])


def test_all_wrong_settings_are_told_with_the_nearest(nets):
    with pytest.raises(RecipeError) as caught:
        distill(*nets, config={"rouns": 1, "bn_wieght": 1, "student_lr": -1})
    told = str(caught.value)
    assert "config.rouns: no such key; did you mean 'rounds'?" in told
    assert "config.bn_wieght: no such key; did you mean 'bn_weight'?" in told
    assert "config.student_lr: got -1" in told
    with pytest.raises(RecipeError):
        distill(*nets, config={1: 2})


def test_unknown_methods_plug_ins_and_devices_are_named(nets):
    with pytest.raises(RecipeError, match="did you mean 'dfad'"):
        distill(*nets, method="dfadd")
    with pytest.raises(RecipeError, match="got plugin 'abdd'"):
        distill(*nets, plugins=["abdd"])
    with pytest.raises(RecipeError, match="name each one once"):
        distill(*nets, plugins=["abd", ("abd", {})])
    with pytest.raises(RecipeError, match="got device 'gpu'"):
        distill(*nets, device="gpu")


def test_wrong_settings_of_a_plug_in_are_a_recipe_error(nets):
    from pydantic import BaseModel, ConfigDict

    from vestige.core.types import Requires

    class Settings(BaseModel):
        model_config = ConfigDict(extra="forbid")
        share: float = 0.5

    class Plain:
        Config, requires = Settings, Requires()
        setup = parts = None

    with pytest.raises(RecipeError, match=r"plugins\..*Plain\.shar: no such key; did you mean"):
        distill(*nets, plugins=[(Plain, {"shar": 1})])


# Names


def test_import_loads_nothing_but_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import vestige; dir(vestige); vestige.__version__\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "strange = new - set(sys.stdlib_module_names) - {'vestige'}\n"
        "assert not strange, strange\n"
        "assert not {n for n in sys.modules if n.startswith('vestige.')}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_there_and_no_others():
    assert set(vestige.__all__) == set(dir(vestige))
    for name in vestige.__all__:
        assert getattr(vestige, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        vestige.distil  # noqa: B018


def test_every_argument_of_distill_is_explained():
    doc = inspect.getdoc(vestige.distill)
    for name in inspect.signature(vestige.distill).parameters:
        assert f"\n    {name}:" in doc, name


def test_methods_are_listed_with_what_a_user_must_know():
    rows = {row["name"]: row for row in vestige.list_methods()}
    assert list(rows) == METHODS.names()
    for row in rows.values():
        assert set(row) == {"name", "summary", "paper", "tasks", "access", "batchnorm", "needs"}
        assert row["summary"].endswith(".") and "arXiv" in row["paper"]
    assert rows["dfad"]["access"] == "white_box" and rows["kd"]["access"] == "scores"
    assert rows["kd"]["needs"] == ["source 'inputs'"] and rows["dfad"]["needs"] == []
    assert rows["dfad"]["tasks"] == ["classification", "segmentation"]


def test_load_teacher_is_the_documented_one():
    teacher = vestige.load_teacher("builtin:digits-convnet")
    assert not teacher.training
    with pytest.raises(TeacherError, match="builtin:"):
        vestige.load_teacher("digits")


def test_memory_shared_with_the_teacher_is_refused(nets):
    # The natural way to start from the teacher, and new Parameter objects over the same memory.
    student = copy.deepcopy(nets[0])
    student.load_state_dict(nets[0].state_dict(), assign=True)
    with pytest.raises(TeacherError, match="share weights"):
        distill(nets[0], student)
    buffers = copy.deepcopy(nets[0])
    buffers.look[1].running_mean = nets[0].look[1].running_mean
    with pytest.raises(TeacherError, match="share weights"):
        distill(nets[0], buffers)


def test_lazy_layers_get_their_weights(nets):
    student = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    report = distill(nets[0], student)
    assert report.student[1].weight.shape[0] == 3


@pytest.mark.parametrize(
    "value", [None, 0.5, "good", {"accuracy": "x"}, {"accuracy": float("nan")}]
)
def test_what_a_callable_returns_is_checked(value, nets):
    with pytest.raises(RecipeError, match="evaluate returned"):
        distill(*nets, evaluate=lambda model: value)


def test_a_callable_may_return_tensors(nets):
    report = distill(*nets, evaluate=lambda model: {"accuracy": torch.tensor(0.5)})
    assert report.summary["student"]["score"] == 0.5


def test_a_black_box_with_a_budget_is_a_teacher(nets):
    box = BlackBoxTeacher(nets[0], budget=16)
    config = {"rounds": 1, "iterations": 2, "batch_size": 8}
    noise = {"inputs": torch.randn(32, *SPEC.shape)}
    asked = {"method": "kd", "config": config, "sources": noise, "spec": SPEC, "num_classes": 3}
    report = vestige.distill(box, nets[1], device="cpu", **asked)
    assert (box.queries, report.summary["teacher_queries"]) == (16, 16)
    with pytest.raises(AccessError):
        distill(box, nets[1])


def test_a_budget_that_ended_the_run_is_told(nets):
    report = distill(*nets, budget={"steps": 1})
    assert report.summary["complete"] is False
    assert "stopped-by-budget" in [note["code"] for note in report.summary["diagnosis"]]


def test_the_variant_is_named(nets):
    assert distill(*nets, defaults="published").summary["variant"] == ""
    named = distill(*nets, config={"bn_weight": 1.0}, defaults="published").summary["variant"]
    assert named == "BN statistics"


def test_a_class_is_a_method_and_a_class_is_a_plug_in(nets):
    from vestige.methods.dfad import DFAD

    class Mine(DFAD):
        """A method that lives where nobody can import it from."""

    class Doubled:
        """A plug-in of the same kind."""

        class Config(METHODS.get("kd").Config):
            """Settings that nobody needs."""

        requires = vestige.core.types.Requires()

        def __init__(self, cfg):
            self.cfg = cfg

        def setup(self, task, teachers, student, ctx):
            pass

        def parts(self):
            return {}

        def source_terms(self, loss, batch):
            return {"doubled": loss.total}

    by_name = distill(*copy.deepcopy(nets))
    by_class = distill(*copy.deepcopy(nets), method=Mine)
    assert differing(state(by_name.student), state(by_class.student)) == []
    assert by_class.summary["method"].endswith(
        ":test_a_class_is_a_method_and_a_class_is_a_plug_in.<locals>.Mine"
    )
    wrapped = distill(*copy.deepcopy(nets), plugins=[Doubled])
    assert len(wrapped.summary["plugins"]) == 1
    with pytest.raises(RecipeError, match="name each one once"):
        distill(*nets, plugins=[Doubled, (Doubled, {})])
    with pytest.raises(RecipeError, match="lacks Config, requires"):
        distill(*nets, method=Net)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"precison": "bf16"}, "trainer.precison: no such key; did you mean 'precision'"),
        ({"log_every": 0}, "trainer.log_every: got 0"),
        ({"minutes": 3}, r"trainer: got \['minutes'\], which distill takes as device, budget"),
    ],
)
def test_how_a_run_is_driven_is_checked(given, named, nets):
    with pytest.raises(RecipeError, match=named):
        distill(*nets, trainer=given)


def test_how_a_run_is_driven_can_be_said(nets, tmp_path):
    distill(*nets, trainer={"log_every": 1}, out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert len([row for row in rows if row["kind"] == "step"]) == STEPS
