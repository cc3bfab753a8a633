"""`vestige.distill` as a stranger calls it: no settings, whatever inputs, and what it tells."""

import copy
import doctest
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import Tensor, nn

import vestige
from vestige.core.types import InputSpec
from vestige.errors import CheckpointError, RecipeError, ShapeError
from vestige.methods.dfad import DFADConfig
from vestige.models.classifiers import ConvNet, LeNet5
from vestige.training.tracking import Event

# Only the length is taken away; everything else is what is suggested.
SHORT = {"rounds": 1, "iterations": 1, "student_steps": 1, "batch_size": 4}


class Answers(nn.Module):
    """A network without a name that a library knows, answering in one of several forms."""

    def __init__(self, channels: int, classes: int, form: str, norm: bool = True):
        super().__init__()
        self.form = form
        layers = [nn.Conv2d(channels, 6, 3, stride=2, padding=1)]
        if norm:
            layers.append(nn.BatchNorm2d(6))
        self.look = nn.Sequential(*layers, nn.ReLU())
        self.say = nn.Linear(6, classes)

    def forward(self, images: Tensor):
        seen = self.look(images).mean((2, 3))
        said = self.say(seen)
        return {
            "tensor": said,
            "tuple": (said, seen),
            "mapping": {"logits": said, "seen": seen},
            "object": SimpleNamespace(logits=said),
        }[self.form]


def distill(teacher: nn.Module, student: nn.Module, spec: InputSpec, classes: int, **given):
    config = {**SHORT, **given.pop("config", {})}
    return vestige.distill(
        teacher, student, spec=spec, num_classes=classes, config=config, device="cpu", **given
    )


def test_the_example_in_the_docstring_is_true():
    found = doctest.DocTestFinder(recurse=False).find(vestige.distill, "distill")
    assert len(found) == 1
    assert len(found[0].examples) > 4
    assert doctest.DocTestRunner().run(found[0]).failed == 0


@pytest.fixture
def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Answers(1, 3, "tensor"), Answers(1, 3, "tensor")


SPEC = InputSpec.image(1, 8, 8)


@pytest.mark.parametrize("norm", [True, False], ids=["batchnorm", "no-batchnorm"])
@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "object"])
@pytest.mark.parametrize(
    ("channels", "size", "classes"),
    [(1, (8, 8), 2), (1, (28, 28), 10), (3, (32, 32), 1000), (3, (33, 47), 5), (3, (64, 96), 7)],
)
def test_any_inputs_classes_and_answers_train_without_settings(channels, size, classes, form, norm):
    spec = InputSpec.image(channels, *size, mean=[0.4] * channels, std=[0.3] * channels)
    teacher, student = (Answers(channels, classes, form, norm) for _ in range(2))
    before = copy.deepcopy(student.state_dict())
    report = distill(teacher, student, spec, classes)
    assert report.summary["steps"] == 2
    assert all(not torch.equal(v, before[n]) for n, v in student.state_dict().items())
    assert ("BN statistics" in report.summary["variant"]) is norm


@pytest.mark.parametrize(("size", "classes"), [(8, 1000), (224, 2), (224, 1000)])
def test_the_ends_of_the_range_work(size, classes):
    spec = InputSpec.image(3, size, size)
    report = distill(ConvNet(3, classes), ConvNet(3, classes, widths=(4, 8)), spec, classes)
    assert report.source(torch.randn(2, 100)).shape == (2, 3, size, size)


def test_frozen_batchnorm_stays_frozen_with_suggested_settings():
    teacher, student = Answers(3, 4, "tuple"), Answers(3, 4, "tensor")
    student.look[1].eval().requires_grad_(False)
    before = copy.deepcopy(student.look[1].state_dict())
    distill(teacher, student, InputSpec.image(3, 16, 16), 4)
    assert all(torch.equal(v, before[n]) for n, v in student.look[1].state_dict().items())


# Which setting wins


def settings_of(folder) -> dict:
    return yaml.safe_load((folder / "recipe.yaml").read_text())["config"]


def test_suggested_settings_are_the_lowest_layer_and_are_written_out(nets, tmp_path):
    distill(*nets, SPEC, 3, out=tmp_path / "a", config={"bn_weight": 0.25})
    used = settings_of(tmp_path / "a")
    assert set(used) == set(DFADConfig.model_fields)
    assert (used["bn_weight"], used["rounds"]) == (0.25, 1)
    assert used["units"] == "relative"
    assert used["student_optimizer"] == "adam"


def test_published_settings_are_a_word_away(nets, tmp_path):
    distill(*nets, SPEC, 3, out=tmp_path / "a", defaults="published", config={"generator_width": 4})
    published = DFADConfig(**SHORT, generator_width=4).model_dump(mode="json")
    assert settings_of(tmp_path / "a") == published
    with pytest.raises(RecipeError, match="defaults: got 'paper', expected 'suggested' or"):
        distill(*nets, SPEC, 3, defaults="paper")


def test_a_mistake_in_the_settings_is_told_before_the_networks_are_touched(nets):
    nets[0].look[0].weight.data.fill_(float("nan"))
    with pytest.raises(RecipeError, match="did you mean 'rounds'"):
        distill(*nets, SPEC, 3, config={"round": 1})


# Seeds, folders, judges


@pytest.mark.parametrize("seed", [-1, 1.0, "1", True, None])
def test_a_seed_is_a_whole_number(seed, nets):
    with pytest.raises(RecipeError, match="seed: got"):
        distill(*nets, SPEC, 3, seed=seed)


class Stopped(BaseException):
    """Not an Exception, so that nothing on the way may swallow it."""


def test_resuming_refuses_other_source_tensors(nets, tmp_path):
    config = {"rounds": 2, "iterations": 1, "batch_size": 4}
    inputs = torch.randn(16, 1, 8, 8)

    def stop(event: Event) -> None:
        if event.kind == "round":
            raise Stopped

    def go(tensor: Tensor, **given):
        return vestige.distill(
            nets[0],
            copy.deepcopy(nets[1]),
            method="kd",
            spec=SPEC,
            num_classes=3,
            config=config,
            sources={"inputs": tensor},
            device="cpu",
            out=tmp_path / "run",
            **given,
        )

    with pytest.raises(Stopped):
        go(inputs, callbacks=[stop])
    with pytest.raises(CheckpointError, match=r"other settings \(sources\)"):
        go(inputs + 1, resume=True)
    assert go(inputs.clone(), resume=True).summary["complete"]


@pytest.mark.parametrize("what", ["weight", "buffer"])
def test_a_judge_that_changes_the_student_is_found_out(what, nets):
    def judge(model: nn.Module) -> dict[str, float]:
        if model is nets[1]:
            if what == "weight":
                # Past the version counter, as old code does it.
                model.say.weight.data.mul_(1.01)
            else:
                model.train()
                model(torch.randn(4, 1, 8, 8))
        return {"accuracy": 0.5}

    name = "say.weight" if what == "weight" else "running_mean"
    with pytest.raises(RecipeError, match=rf"evaluate changed '[\w.]*{name}'"):
        distill(*nets, SPEC, 3, evaluate=judge)


def test_bytes_are_no_evaluation_inputs(nets):
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    with pytest.raises(ShapeError, match=r"torch.uint8.*spec.normalize\(inputs / 255\)"):
        distill(*nets, SPEC, 3, evaluate=(images, torch.zeros(4, dtype=torch.long)))


def test_what_is_wrong_with_the_inputs_is_told_first_and_kept(nets):
    told = []
    inputs = torch.rand(60, 1, 8, 8) * 255
    labels = torch.arange(60) % 3
    report = distill(*nets, SPEC, 3, evaluate=(inputs, labels), callbacks=[told.append])
    kinds = [event.kind for event in told]
    assert kinds[:2] == ["start", "warning"]
    assert "evaluation inputs run from" in told[1].data["message"]
    codes = [finding["code"] for finding in report.summary["diagnosis"]]
    assert "evaluation-inputs" in codes


# What is shown


def test_events_hold_what_their_table_says(nets):
    told = []
    inputs, labels = torch.rand(9, 1, 8, 8), torch.arange(9) % 3
    distill(
        *nets,
        SPEC,
        3,
        evaluate=(inputs, labels),
        callbacks=[told.append],
        config={"iterations": 10},
    )
    rows = re.findall(r"\| `(\w+)` \|[^|]*\| ([^|]*)\|", Event.__doc__)
    more = re.findall(r"\| \| \| ([^|]*)\|", Event.__doc__)
    promised = {kind: set(re.findall(r"`(\w+)`", text)) for kind, text in rows}
    promised["round"] |= set(re.findall(r"`(\w+)`", more[0]))
    promised["step"].discard("role")
    seen = {event.kind: set(event.data) for event in told}
    assert set(promised) == {"start", "step", "evaluation", "round", "warning", "end"}
    for kind, keys in seen.items():
        assert keys == promised[kind], kind
    step = next(event for event in told if event.kind == "step")
    assert set(step.data["terms"]) <= {"student", "source"}
    assert all(isinstance(v, float) for role in step.data["terms"].values() for v in role.values())


def test_a_report_shows_scores_gap_findings_and_pictures(nets):
    inputs, labels = torch.rand(30, 1, 8, 8), torch.arange(30) % 3
    report = distill(*nets, SPEC, 3, evaluate=(inputs, labels), config={"iterations": 10}, seed=1)
    teacher, student = (report.summary[who]["score"] for who in ("teacher", "student"))
    line = repr(report)
    assert line.startswith("DistillReport(method=dfad (")
    assert len(line) < 400
    page = report._repr_html_()
    for text in (f"{teacher:.4g}", f"{student:.4g}", f"{teacher - student:.4g}", "dfad"):
        assert text in line
        assert text in page
    assert "data:image/png;base64,iVBOR" in page
    assert "<script" not in page


def test_a_report_without_a_judge_or_pictures_is_shown_too(nets):
    report = distill(*nets, SPEC, 3)
    assert "gap" not in repr(report)
    assert "<img" in report._repr_html_() or report.outcome.samples is None
    json.dumps(report.summary)


def test_progress_can_be_asked_for_and_is_off_without_a_terminal(nets, capsys):
    distill(*nets, SPEC, 3)
    assert "left" not in capsys.readouterr().err
    distill(*nets, SPEC, 3, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "distill" in err


def test_a_notebook_shows_a_live_table(nets, monkeypatch):
    pages = []
    display = SimpleNamespace(
        HTML=lambda text: text,
        display=lambda page, display_id: pages.append(page) or SimpleNamespace(update=pages.append),
    )
    shell = SimpleNamespace(kernel=object())
    fake = SimpleNamespace(get_ipython=lambda: shell, display=display)
    monkeypatch.setitem(sys.modules, "IPython", fake)
    distill(*nets, SPEC, 3)
    assert "1 of 1 (100%)" in pages[-1]


def test_a_teacher_without_batchnorm_gets_settings_of_its_own():
    spec = InputSpec.image(1, 28, 28, mean=[0.13], std=[0.31])
    report = distill(LeNet5(10, 1, size=28), LeNet5(10, 1, size=28, half=True), spec, 10)
    assert report.summary["variant"] != ""
    assert "BN statistics" not in report.summary["variant"]
