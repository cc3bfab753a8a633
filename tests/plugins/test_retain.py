"""Retain: the gradient that flows through the inner step, and what it must leave alone."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vestige.core.types import Batch, InputSpec, Loss, Prediction, predict
from vestige.errors import AccessError
from vestige.losses.distill import l1_logits
from vestige.plugins.retain import Retain, RetainConfig
from vestige.recipes.build import build_method
from vestige.recipes.catalog import METHODS
from vestige.tasks.classification import Classification
from vestige.teachers.black_box import BlackBoxTeacher
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.checkpoint import CheckpointStore
from vestige.training.context import RunContext
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.image(1, 8, 8)
ROWS = 6
SMALL_VAE = {"memory": "generative", "generator_width": 2, "latent_dim": 5}


def context(seed: int = 0, **plugins: Any) -> RunContext:
    return RunContext(
        seed=seed,
        device=torch.device("cpu"),
        plugins=plugins,
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=lambda: True,
    )


class Bench:
    """One student, one teacher and a loss, updated batch by batch through the trainer's context."""

    def __init__(
        self,
        student: nn.Module,
        teacher: Callable[[Tensor], Tensor],
        *,
        power: int = 1,
        scale: float = 1.0,
        own: bool = True,
        **settings: Any,
    ) -> None:
        self.student, self.power, self.scale, self.own = student, power, scale, own
        self.teacher = teacher
        self.plugin = Retain(RetainConfig(**{"least_rows": 2, **settings}))
        self.ctx = context(retain=self.plugin)
        task = Classification(SPEC, 3)
        self.plugin.setup(task, [teacher], student, self.ctx)
        self.grads: list[dict[str, Tensor]] = []
        # A step that keeps the weights, so that gradients of one point can be compared.
        self.optimizer = self.ctx.optimizer(
            "student", student.parameters(), lambda params: torch.optim.SGD(params, 0.0)
        )
        self.optimizer.register_step_pre_hook(self._look)
        self.calls: list[Batch] = []

    def _look(self, *_: Any) -> None:
        named = self.student.named_parameters()
        self.grads.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    def loss(self, model: Any, batch: Batch) -> Loss:
        self.calls.append(batch)
        with torch.no_grad():
            wanted = predict(self.teacher, batch.inputs)
        answer = predict(model, batch.inputs)
        distance = (answer.logits - wanted.logits).abs().pow(self.power).mean(1)
        total = batch.mean(distance)
        # Of the live student: what the method does by itself.
        own = self.own or model is not self.student
        total = self.scale * total if own else 0 * total
        return Loss({"distance": total}, total, batch.inputs, wanted, answer)

    def step(self, inputs: Tensor) -> Loss:
        made = self.ctx.update("student", self.student, self.loss, Batch(inputs), self.optimizer)
        assert made.loss is not None
        return made.loss


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Answers:
    """A teacher that is a function."""

    access = "white_box"

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, inputs: Tensor) -> Prediction:
        return Prediction(self.function(inputs))


def linear_case(outputs: int, **settings: Any) -> tuple[Bench, Tensor, Tensor, Tensor]:
    """A linear student with squared loss; new inputs, remembered ones and the true weights."""
    torch.manual_seed(3)
    truth = torch.randn(4, outputs, dtype=torch.float64)
    settings = {"share": 1.0, "joint": "acquire", "inner_lr": 0.3, **settings}
    bench = Bench(Linear(4, outputs), Answers(lambda x: x @ truth), power=2, **settings)
    remembered, new = (torch.randn(ROWS, 4, dtype=torch.float64) for _ in range(2))
    bench.step(remembered)
    return bench, new, remembered, truth


def squared(x: Tensor, weight: Tensor, truth: Tensor) -> Tensor:
    """Gradient of the mean squared error over rows and outputs."""
    return 2 * x.T @ (x @ (weight - truth)) / (len(x) * truth.shape[1])


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("meta", ["full", "first-order"])
@pytest.mark.parametrize("joint", ["acquire", "concat"])
def test_the_gradient_is_the_one_of_the_paper(outputs, decay, meta, joint):
    bench, new, old, truth = linear_case(outputs, meta=meta, joint=joint, inner_weight_decay=decay)
    weight = bench.student.weight.detach().clone()
    bench.step(new)
    rate = 0.3
    moved = weight - rate * (squared(new, weight, truth) + decay * weight)
    expected = squared(old, moved, truth)
    if meta == "full":
        hessian = 2 * new.T @ new / (len(new) * outputs) + decay * torch.eye(4).double()
        expected = expected - rate * hessian @ expected
    seen = new if joint == "acquire" else torch.cat([new, old])
    expected = expected + squared(seen, weight, truth)
    # Rounding of float64.
    torch.testing.assert_close(bench.grads[-1]["weight"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("meta", ["full", "first-order"])
def test_without_an_inner_step_retention_is_the_loss_where_the_student_is(meta):
    bench, new, old, truth = linear_case(2, meta=meta, inner_lr=0.0)
    weight = bench.student.weight.detach()
    bench.step(new)
    expected = squared(old, weight, truth) + squared(new, weight, truth)
    torch.testing.assert_close(bench.grads[-1]["weight"], expected, rtol=1e-12, atol=1e-12)
    bench.step(old)  # the bank now holds old and new; with x_m = x both terms are the same
    bench.plugin.memory.bank.load_state_dict(
        {"inputs": {"": old[None]}, "answers": None, "pushed": 1}
    )
    bench.step(old)
    torch.testing.assert_close(bench.grads[-1]["weight"], 2 * squared(old, weight, truth))


def smooth(rng_seed: int = 0) -> nn.Sequential:
    torch.manual_seed(rng_seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_the_gradient_agrees_with_finite_differences():
    student, truth = smooth(), smooth(1).requires_grad_(False)
    decay, rate = 0.01, 0.4
    bench = Bench(
        student,
        Answers(truth),
        power=2,
        share=1.0,
        joint="acquire",
        inner_lr=rate,
        inner_weight_decay=decay,
        own=False,
    )
    old, new = (torch.randn(ROWS, 4, dtype=torch.float64) for _ in range(2))
    bench.step(old)
    bench.step(new)
    names = [name for name, _ in student.named_parameters()]
    weights = [p.detach().clone() for p in student.parameters()]

    def loss(at: list[Tensor], x: Tensor) -> Tensor:
        answer = torch.func.functional_call(student, dict(zip(names, at, strict=True)), (x,))
        return (answer - truth(x)).square().mean()

    def objective(at: list[Tensor]) -> float:
        at = [one.detach().requires_grad_(True) for one in at]
        slopes = torch.autograd.grad(loss(at, new), at)
        moved = [w - rate * (g + decay * w) for w, g in zip(at, slopes, strict=True)]
        return float(loss(moved, old).detach())

    step = 1e-5
    for index, name in enumerate(names):
        for place in range(min(4, weights[index].numel())):
            ends = []
            for sign in (1, -1):
                at = [one.clone() for one in weights]
                at[index].view(-1)[place] += sign * step
                ends.append(objective(at))
            slope = (ends[0] - ends[1]) / (2 * step)
            # Central differences: an error of the square of the step.
            assert bench.grads[-1][name].view(-1)[place].item() == pytest.approx(slope, abs=1e-8)


def test_for_small_inner_steps_the_gradients_are_drawn_together():
    student, truth = smooth(), smooth(1).requires_grad_(False)
    old, new = (torch.randn(ROWS, 4, dtype=torch.float64) for _ in range(2))
    weights = list(student.parameters())
    decay = 0.02

    def slopes(x: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((student(x) - truth(x)).square().mean(), weights))

    acquired = [g + decay * w.detach() for g, w in zip(slopes(new), weights, strict=True)]
    inner = sum((a * b).sum() for a, b in zip(acquired, slopes(old), strict=True))
    rests = []
    for rate in (1e-2, 1e-3):
        bench = Bench(
            student,
            Answers(truth),
            power=2,
            share=1.0,
            joint="acquire",
            inner_lr=rate,
            inner_weight_decay=decay,
        )
        plain = bench.step(old).total
        term = bench.step(new).terms["retention"]
        rests.append(float(abs((term - plain + rate * inner) / rate)))
    # L(w') - L(w) + a g_R g_A is of second order in a, so divided by a it shrinks with a.
    assert rests[1] == pytest.approx(rests[0] / 10, rel=0.05)


# The fault of the public code


@pytest.mark.parametrize("meta", ["full", "first-order"])
@pytest.mark.parametrize("retention_loss", ["method", "l1"])
def test_retention_alone_trains_the_student(meta, retention_loss, tiny_teacher, tiny_student):
    bench = Bench(
        tiny_student,
        WhiteBoxTeacher(tiny_teacher),
        own=False,
        meta=meta,
        retention_loss=retention_loss,
        inner_lr=0.1,
    )
    bench.step(torch.randn(ROWS, 1, 8, 8))
    bench.step(torch.randn(ROWS, 1, 8, 8))
    first, second = bench.grads
    assert not any(grad.any() for grad in first.values())
    assert all(torch.isfinite(grad).all() for grad in second.values())
    assert all(second[name].any() for name in ("0.weight", "1.weight", "5.weight", "5.bias"))


def test_l1_is_the_mean_difference_of_logits_whatever_the_method_does(tiny_teacher, tiny_student):
    inputs = torch.randn(ROWS, 1, 8, 8)
    benches = [
        Bench(
            copy.deepcopy(tiny_student),
            WhiteBoxTeacher(tiny_teacher),
            power=2,
            scale=7.0,
            retention_loss=kind,
            inner_lr=0.0,
            share=1.0,
        )
        for kind in ("l1", "method")
    ]
    terms = []
    for bench in benches:
        bench.step(inputs)
        terms.append(bench.step(torch.randn(ROWS, 1, 8, 8)).terms["retention"])
    answer = tiny_student(inputs)
    expected = l1_logits(answer, tiny_teacher(inputs)).mean()
    torch.testing.assert_close(terms[0], expected.detach())
    torch.testing.assert_close(terms[1], 7 * (answer - tiny_teacher(inputs)).square().mean())


def test_l1_on_a_bank_asks_the_teacher_nothing(tiny_teacher, tiny_student):
    asked = []
    for settings in ({"meta": "none"}, {"retention_loss": "l1", "meta": "first-order"}):
        teacher = WhiteBoxTeacher(copy.deepcopy(tiny_teacher))
        bench = Bench(copy.deepcopy(tiny_student), teacher, share=0.5, **settings)
        for _ in range(3):
            bench.step(torch.randn(ROWS, 1, 8, 8))
        asked.append(teacher.queries)
    # The two updates with retention ask for the new rows of the inner step only.
    assert asked[1] - asked[0] == 2 * ROWS


# What it leaves alone


def test_without_meta_it_is_replay_bit_for_bit(tiny_teacher, tiny_student):
    inputs = [torch.randn(ROWS, 1, 8, 8) for _ in range(2)]
    bench = Bench(tiny_student, WhiteBoxTeacher(tiny_teacher), meta="none", share=0.5)
    for one in inputs:
        bench.step(one)
    joined = torch.cat([inputs[1], inputs[0][:3]])
    assert torch.equal(bench.calls[-1].inputs, joined)
    assert len(bench.calls) == 2
    other = copy.deepcopy(tiny_student)
    grads = torch.autograd.grad(bench.loss(other, Batch(joined)).total, list(other.parameters()))
    for (name, _), grad in zip(other.named_parameters(), grads, strict=True):
        assert torch.equal(bench.grads[-1][name], grad), name


@pytest.mark.parametrize("meta", ["full", "first-order"])
@pytest.mark.parametrize("joint", ["concat", "acquire"])
def test_live_statistics_move_as_without_retention(meta, joint, tiny_teacher, dropout_student):
    inputs = [torch.randn(ROWS, 1, 8, 8) for _ in range(2)]

    def buffers(**settings: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        student = copy.deepcopy(dropout_student)
        # Dropout in front: what it draws decides the statistics.
        student.insert(0, nn.Dropout(0.3))
        student.train()
        bench = Bench(student, WhiteBoxTeacher(copy.deepcopy(tiny_teacher)), **settings)
        for one in inputs:
            bench.step(one)
        return {name: value.clone() for name, value in student.named_buffers()}

    with_it = buffers(meta=meta, joint=joint)
    if joint == "concat":
        without = buffers(meta="none")
    else:
        torch.manual_seed(0)
        student = nn.Sequential(nn.Dropout(0.3), *copy.deepcopy(dropout_student)).train()
        for one in inputs:
            student(one)
        without = dict(student.named_buffers())
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_teacher_and_generator_get_no_gradient(tiny_teacher, tiny_student):
    made = torch.randn(ROWS, 1, 8, 8, requires_grad=True)
    bench = Bench(tiny_student, WhiteBoxTeacher(tiny_teacher))
    bench.step(made.detach())
    bench.step(made.detach())
    assert made.grad is None
    assert all(weight.grad is None for weight in tiny_teacher.parameters())
    assert all(weight.grad is None for weight in tiny_student.parameters())


def test_a_retention_term_that_is_not_finite_is_left_out_and_told_once(
    tiny_teacher, tiny_student, caplog
):
    inputs = [torch.randn(ROWS, 1, 8, 8) for _ in range(3)]
    wild = Bench(tiny_student, WhiteBoxTeacher(tiny_teacher), inner_lr=1e30)
    plain = Bench(copy.deepcopy(tiny_student), WhiteBoxTeacher(tiny_teacher), meta="none")
    with caplog.at_level(logging.WARNING):
        losses = [wild.step(one) for one in inputs]
    for one in inputs:
        plain.step(one)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Lower inner_lr" in caplog.text
    assert [float(loss.terms["retention"]) for loss in losses[1:]] == [0.0, 0.0]
    for wanted, got in zip(plain.grads, wild.grads, strict=True):
        assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_replayed_rows_are_marked_as_not_new(tiny_teacher, tiny_student):
    bench = Bench(tiny_student, WhiteBoxTeacher(tiny_teacher), share=0.5)
    assert bench.step(torch.randn(ROWS, 1, 8, 8)).fresh is None
    loss = bench.step(torch.randn(ROWS, 1, 8, 8))
    assert loss.fresh is not None
    assert loss.fresh.tolist() == [True] * ROWS + [False] * 3
    assert len(loss.teacher.logits) == ROWS + 3


# The memory


def pushed(bench: Bench, loops: dict[str, int], updates: int) -> list[Tensor]:
    """Runs updates of `loops`; the first rows of each, and whether they were pushed."""
    seen: list[Tensor] = []
    for name, rounds in loops.items():
        for _ in bench.ctx.rounds(name, rounds):
            for _ in range(updates):
                inputs = torch.randn(ROWS, 1, 8, 8)
                bench.step(inputs)
                seen.append(inputs[:3])
    return seen


def kept(bench: Bench, seen: list[Tensor]) -> list[int]:
    """Numbers of the updates whose rows are in the bank."""
    chunks = bench.plugin.memory.bank.state_dict()["inputs"][""]
    return [next(i for i, one in enumerate(seen) if torch.equal(one, c)) for c in chunks]


def test_chunks_are_pushed_at_even_distances_of_the_run(tiny_teacher, tiny_student):
    teacher = WhiteBoxTeacher(tiny_teacher)
    bench = Bench(tiny_student, teacher, meta="none", pushes=4, chunks=20, share=0.5)
    seen = pushed(bench, {"distill": 8}, 5)
    # In the first round the first, second and fourth update; then at 1/4, 1/2 and 3/4.
    assert kept(bench, seen) == [0, 1, 3, 10, 20, 30]


def test_a_chunk_is_pushed_within_a_round_as_well(tiny_teacher, tiny_student):
    teacher = WhiteBoxTeacher(tiny_teacher)
    bench = Bench(tiny_student, teacher, meta="none", pushes=8, chunks=20, share=0.5)
    seen = pushed(bench, {"first": 2, "second": 2}, 4)
    # After the first round each update is an eighth of its loop; a loop begins with nothing due.
    assert kept(bench, seen) == [0, 1, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15]


def test_the_retention_term_of_a_small_batch_has_more_rows_than_its_share():
    settings = ({}, {"least_rows": 2, "share": 0.5}, {"meta": "none"})
    rows = [Retain(RetainConfig(**one)).rows for one in settings]
    assert [rows[0](size) for size in (1, 8, 64, 256, 512)] == [2, 8, 32, 32, 64]
    assert [rows[1](size) for size in (1, 2, 7, 64)] == [2, 2, 4, 32]
    assert [rows[2](size) for size in (8, 64, 512)] == [2, 8, 64]


def test_the_methods_own_loss_sees_the_share_alone(tiny_teacher, tiny_student):
    teacher = WhiteBoxTeacher(tiny_teacher)
    bench = Bench(tiny_student, teacher, meta="first-order", least_rows=16, share=0.25)
    old, new = torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 8)
    bench.step(old)
    loss = bench.step(new)
    joined, inner, retained = (batch.inputs for batch in bench.calls[1:])
    assert torch.equal(joined[:16], new)
    assert torch.equal(inner, new)
    assert torch.equal(retained, old)
    # Four of the sixteen that are remembered, each once.
    found = [int((old == row).flatten(1).all(1).nonzero()) for row in joined[16:]]
    assert len(set(found)) == 4
    assert loss.fresh.tolist() == [True] * 16 + [False] * 4


def test_only_new_rows_are_kept(tiny_teacher, tiny_student):
    bench = Bench(tiny_student, WhiteBoxTeacher(tiny_teacher), share=0.5)
    inputs = torch.randn(ROWS, 1, 8, 8)
    new = torch.tensor([False, True, False, True, True, True])
    batch = Batch(inputs, extra={"fresh": new})
    bench.ctx.update("student", bench.student, bench.loss, batch, bench.optimizer)
    chunk = bench.plugin.memory.bank.draw(torch.Generator().manual_seed(0))
    assert torch.equal(chunk.inputs, inputs[[1, 3, 4]])
    torch.testing.assert_close(chunk.answers, tiny_teacher(inputs)[[1, 3, 4]])


def test_answers_go_along_where_the_method_hands_them_on(tiny_teacher, tiny_student):
    bench = Bench(tiny_student, WhiteBoxTeacher(tiny_teacher), share=0.5)
    for _ in range(2):
        inputs = torch.randn(ROWS, 1, 8, 8)
        batch = Batch(inputs, extra={"teacher": tiny_teacher(inputs)})
        bench.ctx.update("student", bench.student, bench.loss, batch, bench.optimizer)
    joined, inner, retention = bench.calls[1:]
    torch.testing.assert_close(joined.extra["teacher"], tiny_teacher(joined.inputs))
    assert inner is not joined
    torch.testing.assert_close(retention.extra["teacher"], tiny_teacher(retention.inputs))


def test_generative_memory_needs_a_teacher_with_gradients(tiny_teacher, tiny_student):
    with pytest.raises(AccessError, match="expected white_box"):
        Bench(tiny_student, BlackBoxTeacher(tiny_teacher, access="scores"), **SMALL_VAE)


def test_generative_memory_is_taught_after_four_of_ten_updates(tiny_teacher, tiny_student):
    bench = Bench(tiny_student, WhiteBoxTeacher(tiny_teacher), **SMALL_VAE)
    steps, rows = [], []
    for _ in range(20):
        bench.step(torch.randn(ROWS, 1, 8, 8))
        steps.append(bench.plugin.memory.place.steps)
        rows.append(len(bench.calls[-1]))
    assert steps[9] == 4
    assert steps[-1] == 8
    assert steps[0] == 1
    assert len(bench.calls[0]) == ROWS
    # Two remembered rows: the retention term comes last.
    assert rows[1:] == [2] * 19


@pytest.mark.parametrize("bad", [{"meta": "none", "joint": "acquire"}, {"inner_lr": -1}])
def test_settings_that_do_nothing_or_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=r"replays nothing|greater than or equal"):
        RetainConfig(**bad)


# In a run


SMALL = {
    "rounds": 3,
    "iterations": 2,
    "student_steps": 2,
    "batch_size": 8,
    "generator_width": 4,
    "latent_dim": 8,
    "inversion_steps": 2,
    "synthesis_batch_size": 8,
    "bank_size": 12,
    "negatives": 4,
    "head_queries": 2,
    "head_dim": 4,
}


def run(
    teacher: nn.Module,
    student: nn.Module,
    out: Path | None = None,
    stop: int = 0,
    method: str = "dfad",
    **settings: Any,
) -> tuple[nn.Module, Trainer]:
    fields = METHODS.get(method).Config.model_fields
    cfg = METHODS.get(method).Config(**{k: v for k, v in SMALL.items() if k in fields})
    task, student = Classification(SPEC, 3), copy.deepcopy(student)
    teachers = [WhiteBoxTeacher(copy.deepcopy(teacher))]
    trainer = Trainer(
        build_method(method, cfg, task, teachers, student, {}, 0),
        task,
        teachers=teachers,
        student=student,
        out=out,
        plugins={"retain": Retain(RetainConfig(**settings))},
        config=TrainerConfig(device="cpu", log_every=1),
        callbacks=[stopping(stop)] if stop else [],
    )
    return student, trainer


def equal(first: Any, second: Any) -> bool:
    """Whether nested states are the same bit for bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return set(first) == set(second) and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool((first == second).all()) if hasattr(first, "shape") else bool(first == second)


class Killed(Exception):
    pass


def stopping(rounds: int) -> Callable[[Any], None]:
    def stop(event: Any) -> None:
        if event.kind == "round" and event.data["round"] == rounds:
            raise Killed

    return stop


KINDS = [
    pytest.param({"inner_lr": 0.1}, id="bank"),
    pytest.param({**SMALL_VAE, "inner_lr": 0.1}, id="generative"),
    pytest.param({"meta": "first-order", "joint": "acquire", "inner_lr": 0.1}, id="acquire"),
    *(pytest.param({"method": name}, id=name) for name in ("zskt", "dfq", "cmi", "pre-dfkd")),
]


@pytest.mark.parametrize("settings", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(settings, tiny_teacher, dropout_student, tmp_path):
    whole, trainer = run(tiny_teacher, dropout_student, tmp_path / "whole", **settings)
    trainer.run()
    _, trainer = run(tiny_teacher, dropout_student, tmp_path / "cut", stop=2, **settings)
    with pytest.raises(Killed):
        trainer.run()
    resumed, trainer = run(tiny_teacher, dropout_student, tmp_path / "cut", **settings)
    trainer.run(resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    # The memory, its networks and what it drew as well.
    kept = [CheckpointStore(tmp_path / name / "checkpoints").load() for name in ("whole", "cut")]
    assert any(name.startswith("plugin.retain.") for name in kept[0]["parts"])
    for state in kept:
        del state["seconds"]
    assert equal(*kept)


@pytest.mark.parametrize("settings", KINDS)
def test_it_changes_what_is_learned(settings, tiny_teacher, dropout_student):
    arms = []
    for other in (settings, {**settings, "meta": "none", "joint": "concat"}):
        student, trainer = run(tiny_teacher, dropout_student, **other)
        trainer.run()
        arms.append(student.state_dict())
    assert not torch.equal(arms[0]["0.weight"], arms[1]["0.weight"])
