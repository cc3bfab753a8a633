"""Precision, memory format, folding, compilation and lack of memory, in whole runs."""

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vestige.core.functional import functional
from vestige.core.types import Batch, InputSpec, Prediction
from vestige.errors import OutOfMemoryError, RecipeError
from vestige.methods.dfad import DFAD, DFADConfig
from vestige.models.classifiers import ConvNet, wide_resnet
from vestige.models.probes import BatchNormProbe
from vestige.recipes.build import build
from vestige.recipes.loading import load_recipe
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.checkpoint import CheckpointStore
from vestige.training.compute import LARGE, Compute, laid_out
from vestige.training.tracking import Event
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.image(3, 8, 8)
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")), reason="needs a C++ compiler"
)


class Listening(nn.Module):
    """Hands values on and remembers of what kind they were."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, bool, bool]] = []

    def forward(self, values: Tensor) -> Tensor:
        strided = values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
        self.seen.append((values.dtype, torch.is_grad_enabled(), strided))
        return values


def network(width: int) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        Listening(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * width, 3),
    )
    net[1].running_mean.normal_(0, 0.3)
    net[1].running_var.uniform_(0.5, 1.5)
    return net


@pytest.fixture
def nets() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(1)
    return network(8).eval(), network(4)


def trainer(
    nets: tuple[nn.Module, nn.Module],
    out: Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **given: Any,
) -> Trainer:
    teacher, student = (copy.deepcopy(net) for net in nets)
    sizes = {"rounds": 3, "iterations": 2, "student_steps": 2, "batch_size": 8}
    cfg = DFADConfig(**sizes, generator_width=4, latent_dim=6, **(options or {}))
    task, teachers = Classification(SPEC, 3), [WhiteBoxTeacher(teacher)]
    torch.manual_seed(3)
    method = DFAD(cfg, task, teachers, student, {})
    config = TrainerConfig(device="cpu", log_every=1, **(settings or {}))
    return Trainer(
        method, task, teachers=teachers, student=student, out=out, config=config, **given
    )


def run(nets: tuple[nn.Module, nn.Module], out: Path | None = None, **given: Any) -> Trainer:
    resume = given.pop("resume", False)
    made = trainer(nets, out, **given)
    made.run(resume=resume)
    return made


def apart(first: nn.Module, second: nn.Module) -> float:
    one, other = first.state_dict(), second.state_dict()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def images_apart(first: Trainer, second: Trainer) -> float:
    """How far the generators' images are apart.

    Not their weights: BatchNorm cancels the biases before it, so their gradient is rounding alone,
    which Adam turns into whole steps.
    """
    latent = torch.randn(16, 6)
    made = [copy.deepcopy(run.method.generator).train()(latent) for run in (first, second)]
    return float((made[0] - made[1]).detach().abs().max())


class Killed(Exception):
    """The process is gone, as far as the run can tell."""


def dies_at(number: int) -> Any:
    def callback(event: Event) -> None:
        if event.kind == "step" and event.data["step"] == number:
            raise Killed

    return callback


# bf16


def test_passes_run_in_bfloat16_and_what_is_kept_does_not(nets, tmp_path):
    judged: list[torch.dtype] = []

    def judge(student: nn.Module) -> dict[str, float]:
        student[2].seen.clear()
        student.eval()(torch.randn(2, 3, 8, 8))
        judged.extend(kind for kind, *_ in student[2].seen)
        return {"accuracy": 0.5}

    losses: list[torch.dtype] = []
    made = trainer(nets, tmp_path, settings={"precision": "bf16"}, evaluate=judge)
    imitation = made.method.imitation

    def watched(student: Any, batch: Batch) -> Any:
        loss = imitation(student, batch)
        losses.extend((loss.total.dtype, loss.student.logits.dtype, loss.inputs.dtype))
        return loss

    made.method.imitation = watched
    made.run()
    teacher = made.teachers[0].module
    # With gradient for the generator, without for the student's targets.
    assert {(kind, grad) for kind, grad, _ in teacher[2].seen} == {
        (torch.bfloat16, True),
        (torch.bfloat16, False),
    }
    assert set(judged) == {torch.float32} and set(losses) == {torch.float32}
    kept = CheckpointStore(tmp_path / "checkpoints").load()
    assert kept is not None
    for state in (kept["parts"]["method.student"], made.student.state_dict()):
        assert {w.dtype for w in state.values() if w.is_floating_point()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_a_step_in_bfloat16_sees_the_weights_after_the_one_before():
    # torch's autocast keeps converted weights until its block ends, and ours lasts the whole run.
    layer = nn.Linear(2, 1, bias=False)
    inputs = torch.ones(1, 2)
    compute = Compute(CPU, precision="bf16")
    with compute.prepared({"layer": layer}, []):
        for value in (1.0, 3.0):
            with torch.no_grad():
                layer.weight.fill_(value)
            answer = layer(inputs)
            assert answer.dtype == torch.bfloat16 and float(answer.detach()) == 2 * value
        with compute.aside():
            assert layer(inputs).dtype == torch.float32


def test_bf16_resumes_bit_for_bit(nets, tmp_path):
    settings = {"precision": "bf16", "channels_last": True, "fold_teacher": True}
    whole = run(nets, settings=settings)
    with pytest.raises(Killed):
        run(nets, tmp_path, settings=settings, callbacks=[dies_at(8)])
    resumed = run(nets, tmp_path, settings=settings, resume=True)
    assert apart(whole.student, resumed.student) == 0
    assert apart(whole.method.generator, resumed.method.generator) == 0
    assert apart(whole.student, run(nets).student) > 0


@pytest.mark.slow
def test_a_bf16_run_learns_as_the_fp32_run(tmp_path):
    scores = []
    for precision in ("fp32", "bf16"):
        small = ["rounds=6", "iterations=15", "generator_width=8", "batch_size=48"]
        recipe = load_recipe(
            "dfad",
            overrides=[*(f"config.{item}" for item in small), f"trainer.precision={precision}"],
        )
        outcome = build(recipe, out=tmp_path / precision).trainer.run()
        scores.append(outcome.scores[-1]["accuracy"])
    # Ten classes; rounding to 8 bits moves a run about as much as another seed does.
    assert min(scores) > 0.5 and abs(scores[0] - scores[1]) < 0.15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_answers_come_back_in_float32(dtype):
    logits = torch.randn(2, 3, dtype=dtype)
    for answer in (logits, (logits,), {"logits": logits}):
        found = Prediction.of(answer).logits
        assert found.dtype == torch.float32 and torch.equal(found, logits.float())
    assert Prediction.of(logits.double()).logits.dtype == torch.float64


# Memory format and folding


def test_small_networks_are_left_as_they_are(nets):
    off = run(nets, settings={"channels_last": False, "fold_teacher": False})
    assert apart(off.student, run(nets).student) == 0
    compute = Compute(CPU)
    small, large = ConvNet(3, 10), wide_resnet(16, 1)
    assert sum(w.numel() for w in small.parameters()) < LARGE
    assert sum(w.numel() for w in large.parameters()) > LARGE
    assert (compute.lays_out(small), compute.folds(small)) == (False, False)
    assert (compute.lays_out(large), compute.folds(large)) == (True, True)
    assert not Compute(CPU, channels_last=True).lays_out(nn.Linear(400, 400))


def test_channels_last_is_used_undone_and_changes_rounding_alone(nets):
    given = []

    def judge(student: nn.Module) -> dict[str, float]:
        given.append(student[0].weight.is_contiguous(memory_format=torch.channels_last))
        return {"accuracy": 0.5}

    made = run(nets, settings={"channels_last": True}, evaluate=judge)
    assert all(given)
    # The generator's images and the teacher's maps, too.
    assert all(strided for *_, strided in made.teachers[0].module[2].seen)
    for net in (made.student, made.teachers[0].module, made.method.generator):
        assert all(weight.is_contiguous() for weight in net.state_dict().values())
    assert apart(made.student, run(nets).student) < 1e-4


def test_a_student_that_came_channels_last_leaves_so_also_after_an_error(nets):
    nets[1].to(memory_format=torch.channels_last)
    stride = nets[1][0].weight.stride()
    for callbacks in ([], [dies_at(3)]):
        made = trainer(nets, settings={"channels_last": True}, callbacks=callbacks)
        if callbacks:
            with pytest.raises(Killed):
                made.run()
        else:
            made.run()
        assert made.student[0].weight.stride() == stride
        assert made.teachers[0].module[0].weight.is_contiguous()
        assert not made.teachers[0].shortcut.fold
    with laid_out(nets[0]):
        assert not nets[0][0].weight.is_contiguous()


def test_folding_changes_rounding_alone_and_leaves_the_probe_its_layers(nets):
    for options in ({}, {"bn_weight": 1.0}):
        plain, found = (
            run(nets, settings={"fold_teacher": fold}, options=options) for fold in (False, True)
        )
        assert apart(plain.student, found.student) < 1e-4
        assert images_apart(plain, found) < 1e-4


# Lack of memory


def exhausted(kind: str) -> Exception:
    if kind == "cuda":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if kind == "cpu":
        return RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 8 bytes."
        )
    return MemoryError("Unable to allocate 8 GiB for an array")


@pytest.mark.parametrize("kind", ["cuda", "cpu", "numpy"])
@pytest.mark.parametrize("role", ["student", "source"])
def test_a_lack_of_memory_names_the_update_and_the_knobs(nets, tmp_path, kind, role):
    made = trainer(nets, tmp_path)
    name = {"student": "imitation", "source": "generation"}[role]
    original, calls = getattr(made.method, name), []

    def greedy(model: Any, batch: Batch) -> Any:
        calls.append(len(batch))
        if len(calls) == {"student": 7, "source": 4}[role]:
            raise exhausted(kind)
        return original(model, batch)

    setattr(made.method, name, greedy)
    # Two student steps, then one of the source; six steps a round.
    step = {"student": 10, "source": 12}[role]
    with pytest.raises(OutOfMemoryError) as told:
        made.run()
    message = str(told.value)
    assert f"out of memory in the {role} update of step {step} in loop 'distill' (" in message
    assert "config.batch_size" in message and "trainer.precision: bf16" in message
    assert "accumulate" not in message  # DFAD has no such setting
    assert "at step 6, is kept" in message
    assert CheckpointStore(tmp_path / "checkpoints").load() is not None
    setattr(made.method, name, original)
    assert apart(run(nets, tmp_path, resume=True).student, run(nets).student) == 0


def test_a_lack_of_memory_outside_of_updates_and_in_evaluation(nets):
    made = trainer(nets, settings={"precision": "bf16"})
    made.method.fakes = lambda ctx: (_ for _ in ()).throw(exhausted("cuda"))
    with pytest.raises(OutOfMemoryError, match="in loop 'distill' after step 0, outside") as told:
        made.run()
    assert "bf16" not in str(told.value)

    def judge(student: nn.Module) -> dict[str, float]:
        raise exhausted("cpu")

    with pytest.raises(OutOfMemoryError, match="in the evaluation after step 6") as told:
        run(nets, evaluate=judge)
    assert "smaller batches" in str(told.value) and "batch_size" not in str(told.value)


def test_other_errors_stay_what_they_are(nets):
    made = trainer(nets)
    made.method.fakes = lambda ctx: (_ for _ in ()).throw(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else") as told:
        made.run()
    assert type(told.value) is RuntimeError


# Compilation


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"bn_weight": 1.0, "student_mode": "eval"}])
def test_a_compiled_run_is_the_eager_one_within_rounding(nets, tmp_path, options):
    # Listening writes to a list, which torch compiles around; dropout must draw the same.
    nets = tuple(nn.Sequential(*(part for i, part in enumerate(net) if i != 2)) for net in nets)
    nets[0].eval()

    def judge(student: nn.Module) -> dict[str, float]:
        return {"accuracy": float(student.eval()(torch.ones(5, 3, 8, 8)).detach().sum())}

    eager = run(nets, options=options, evaluate=judge)
    settings = {"compile": True, "fold_teacher": True}
    made = run(nets, tmp_path, options=options, settings=settings, evaluate=judge)
    assert apart(eager.student, made.student) < 1e-4
    assert images_apart(eager, made) < 1e-4
    for net in (made.student, made.method.generator):
        assert net._compiled_call_impl is None
    assert made.teachers[0].shortcut.compile is None


@needs_compiler
@pytest.mark.slow
def test_compiled_calls_step_aside_for_hooks_other_weights_and_the_trainer():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    teacher, inputs = WhiteBoxTeacher(copy.deepcopy(net)), torch.randn(6, 3, 4, 4)
    compute = Compute(CPU, compile=True)
    expected = net.eval()(inputs)
    with compute.prepared({"net": net}, [teacher]):
        ran = torch._dynamo.utils.counters["frames"]
        assert torch.allclose(net(inputs), expected, atol=1e-6)
        assert torch.allclose(teacher(inputs).logits, expected, atol=1e-6)
        frames = ran["total"]
        assert frames >= 2
        for model in (net, teacher):
            with BatchNormProbe(model) as probe:
                model(inputs)
            assert torch.allclose(probe.observed()[0].mean, net[0](inputs).mean((0, 2, 3)))
        # Second derivatives through other weights, which compiled code does not have.
        weight = net[3].weight.detach().clone().requires_grad_()
        loss = functional(net, {"3.weight": weight})(inputs).square().sum()
        (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
        slope.square().sum().backward()
        assert weight.grad is not None
        with compute.aside():
            net(inputs[:3])
        assert ran["total"] == frames
        net.train()
        assert not torch.allclose(net(inputs), expected, atol=1e-3)
        assert ran["total"] > frames
    assert torch.equal(net.eval()(inputs[:0]), expected[:0])


def test_a_machine_without_a_compiler_is_told_at_once(monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setattr("torch._inductor.cpp_builder.cpp_compiler_search", _none_found)
    with pytest.raises(RecipeError, match=r"without a C\+\+ compiler.*trainer.compile: false"):
        Compute(CPU, compile=True)


def _none_found(search: Any) -> str:
    from torch._inductor.exc import InvalidCxxCompiler

    raise InvalidCxxCompiler


def test_several_processes_are_not_compiled(monkeypatch):
    compute = Compute(CPU)
    compute.compile = True
    monkeypatch.setattr("vestige.core.parallel.world", lambda: 2)
    with (
        pytest.raises(RecipeError, match=r"2 processes.*trainer.compile: false"),
        compute.prepared({}, []),
    ):
        pass
