"""Rules 1, 2, 6, 7, 8 and 9 of the contract, on the context alone or with the smallest method."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load
from torch import Tensor, nn

from vestige.core import optim
from vestige.core.functional import functional
from vestige.core.protocols import StudentUpdate
from vestige.core.schedules import cosine, multistep
from vestige.core.types import Batch, InputSpec, Loss, Prediction, Requires, Result, Step, predict
from vestige.errors import ContractError
from vestige.tasks.classification import Classification
from vestige.training.checkpoint import decode, encode
from vestige.training.context import RunContext, ScopedContext
from vestige.training.files import tensors_to_bytes
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig


def context(plugins: Mapping[str, Any] | None = None, **given: Any) -> RunContext:
    settings = {
        "seed": 0,
        "device": torch.device("cpu"),
        "plugins": plugins or {},
        "reduce": lambda params: None,
        "on_loop": lambda name, n: 0,
        "on_round": lambda: True,
    }
    return RunContext(**{**settings, **given})


def sgd(lr: float = 0.1) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr)


def linear(seed: int = 0, width: int = 3) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(width, 2).double()


def batch_of(rows: int = 6) -> Batch:
    return Batch(inputs=torch.randn(rows, 3, dtype=torch.float64))


def squares(model: Any, batch: Batch) -> Loss:
    """Mean square of the logits."""
    answer = predict(model, batch.inputs)
    total = batch.mean(answer.logits.square().mean(1))
    return Loss({"squares": total}, total, batch.inputs, Prediction(batch.inputs), answer)


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


# Loops (rule 1)


def test_loops_follow_one_another_and_tell_how_far_they_are():
    ended: list[tuple[str, int, int, float]] = []
    ctx = context(on_round=lambda: ended.append(place(ctx)) or True)

    def place(ctx: RunContext) -> tuple[str, int, int, float]:
        progress = ctx.progress
        return progress.loop, progress.round, progress.rounds, progress.fraction

    started = []
    for name, count in (("invert", 2), ("distill", 4)):
        for index in ctx.rounds(name, count):
            assert ctx.in_round
            started.append((name, index, ctx.progress.round))
        assert not ctx.in_round
    assert started == [("invert", i, i) for i in range(2)] + [("distill", i, i) for i in range(4)]
    assert ended == [("invert", i, 2, i / 2) for i in (1, 2)] + [
        ("distill", i, 4, i / 4) for i in (1, 2, 3, 4)
    ]
    assert ctx.progress.finished == {"invert": 2}


def test_finished_rounds_are_skipped():
    ctx = context(on_loop=lambda name, n: {"invert": 3, "distill": 1}[name])
    assert list(ctx.rounds("invert", 3)) == []
    assert list(ctx.rounds("distill", 3)) == [1, 2]


def test_state_is_restored_when_the_first_item_is_drawn():
    told: list[str] = []
    ctx = context(on_loop=lambda name, n: told.append(name) or 0)
    rounds = ctx.rounds("distill", 2)
    assert told == []
    next(rounds)
    assert told == ["distill"]


def test_loops_do_not_nest():
    ctx = context()
    for _ in ctx.rounds("outer", 1):
        with pytest.raises(ContractError, match=r"'inner' began inside a round of 'outer'.*plain"):
            next(ctx.rounds("inner", 1))
    assert list(ctx.rounds("after", 1)) == [0]


@pytest.mark.parametrize("between", [[], ["other"]])
def test_a_name_is_used_once(between):
    ctx = context()
    for name in ["loop", *between]:
        list(ctx.rounds(name, 1))
    with pytest.raises(ContractError, match="'loop' was run before"):
        list(ctx.rounds("loop", 1))


def test_a_loop_has_rounds():
    with pytest.raises(ContractError, match="n=0, expected at least 1"):
        list(context().rounds("loop", 0))


def test_a_method_may_leave_a_loop_by_break():
    ctx = context()
    for index in ctx.rounds("first", 5):
        if index == 2:
            break
    assert not ctx.in_round
    assert ctx.progress.round == 2
    # Outside of a round again: a persistent optimizer and the next loop are possible.
    ctx.optimizer("student", linear().parameters(), sgd())
    assert list(ctx.rounds("second", 2)) == [0, 1]
    assert ctx.progress.finished == {"first": 2}


def test_an_error_inside_a_round_leaves_it():
    ctx = context()
    with pytest.raises(ZeroDivisionError):
        for _ in ctx.rounds("first", 2):
            raise ZeroDivisionError
    assert ctx.progress.round == 0


def test_a_stop_ends_the_loop_and_lets_no_later_one_begin():
    ctx = context(on_round=lambda: ctx.progress.round < 2)
    assert list(ctx.rounds("first", 5)) == [0, 1]
    assert ctx.cut_short
    assert list(ctx.rounds("second", 5)) == []


def test_a_stop_at_the_end_of_a_loop_cuts_only_a_later_one_short():
    ctx = context(on_round=lambda: ctx.progress.round < 2)
    assert list(ctx.rounds("first", 2)) == [0, 1]
    assert not ctx.cut_short
    assert list(ctx.rounds("second", 5)) == []
    assert ctx.cut_short


# Randomness


def test_a_named_generator_is_its_own_stream():
    ctx, other = context(), context()
    made = ctx.generator("masks")
    assert ctx.generator("masks") is made
    torch.rand(10, generator=made)
    assert torch.equal(torch.rand(3, generator=ctx.rng), torch.rand(3, generator=other.rng))
    fresh = other.generator("views")
    assert not torch.equal(
        torch.rand(3, generator=fresh), torch.rand(3, generator=other.generator("masks"))
    )


def test_generators_continue_where_they_were_whenever_they_are_asked_for():
    ctx = context()
    early, late = ctx.generator("early"), ctx.generator("late")
    torch.rand(5, generator=early), torch.rand(7, generator=late), torch.rand(2, generator=ctx.rng)
    state = copy.deepcopy(ctx.state())
    expected = [torch.rand(3, generator=g) for g in (early, late, ctx.rng)]
    other = context()
    first = other.generator("early")
    other.restore(state, complete=True)
    found = [torch.rand(3, generator=g) for g in (first, other.generator("late"), other.rng)]
    assert all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))


# Optimizers (rule 2)


def test_persistent_optimizers_are_asked_for_outside_of_rounds_and_once():
    ctx, net = context(), linear()
    ctx.optimizer("student", net.parameters(), sgd())
    with pytest.raises(ContractError, match="'student' exists already"):
        ctx.optimizer("student", net.parameters(), sgd())
    for _ in ctx.rounds("loop", 1):
        with pytest.raises(ContractError, match=r"inside a round.*fresh=True"):
            ctx.optimizer("late", net.parameters(), sgd())
    ctx.optimizer("between", net.parameters(), sgd())


def test_fresh_optimizers_start_anew_and_are_never_saved():
    ctx, net = context(), linear()
    ctx.optimizer("student", net.parameters(), sgd())
    for _ in ctx.rounds("loop", 2):
        made = [
            ctx.optimizer("inversion", net.parameters(), torch.optim.Adam, fresh=True)
            for _ in range(2)
        ]
        assert made[0] is not made[1]
        ctx.update("source", net, squares, batch_of(), made[0])
        assert made[0].state
        assert not made[1].state
    assert set(ctx.state()["optimizers"]) == {"student"}
    with pytest.raises(ContractError, match=r"'inversion' is fresh.*no schedule"):
        ctx.optimizer("inversion", net.parameters(), sgd(), cosine(), fresh=True)


@pytest.mark.parametrize("late", [False, True])
def test_an_optimizer_takes_its_state_over_whenever_it_is_asked_for(late):
    def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, 0.1)

    def step(ctx: RunContext, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        ctx.update("student", net, squares, Batch(inputs=torch.ones(2, 3).double()), optimizer)

    net, ctx = linear(), context()
    optimizer = ctx.optimizer("student", net.parameters(), adam, cosine(per="step", steps=10))
    for _ in range(3):
        step(ctx, net, optimizer)
    state, twin = copy.deepcopy(ctx.state()), copy.deepcopy(net)
    step(ctx, net, optimizer)

    other = context()
    if late:
        other.restore(state, complete=False)
    resumed = other.optimizer("student", twin.parameters(), adam, cosine(per="step", steps=10))
    if not late:
        other.restore(state, complete=True)
    step(other, twin, resumed)
    assert torch.equal(weights(net), weights(twin))
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert other.progress.steps == 4


# Updates (rule 6)


def test_an_update_is_one_plain_step():
    net, batch = linear(), batch_of()
    twin, ctx = copy.deepcopy(net), context()
    optimizer = ctx.optimizer("student", net.parameters(), sgd(0.3))
    step = ctx.update("student", net, squares, batch, optimizer)
    loss = twin(batch.inputs).square().mean()
    loss.backward()
    for live, expected in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(live.detach(), expected.detach() - 0.3 * expected.grad)
        assert live.grad is None
    assert step.role == "student"
    assert not step.loss.total.requires_grad
    torch.testing.assert_close(step.loss.total, loss.detach())
    assert ctx.progress.steps == 1


def test_gradients_reach_the_given_optimizers_parameters_and_no_others():
    generator, student = linear(width=3), linear(1, width=2)
    ctx = context()
    optimizer = ctx.optimizer("generator", generator.parameters(), sgd())

    def adversarial(model: Any, batch: Batch) -> Loss:
        answer = predict(student, model(batch.inputs))
        total = -batch.mean(answer.logits.abs().mean(1))
        return Loss({"adversarial": total}, total)

    before = weights(student)
    seen: list[bool] = []
    for parameter in student.parameters():
        parameter.register_hook(lambda grad: seen.append(True))
    ctx.update("source", generator, adversarial, batch_of(), optimizer)
    assert torch.equal(weights(student), before)
    assert all(parameter.grad is None for parameter in student.parameters())
    assert seen == [], "the student's weight gradients were computed and thrown away"


def test_stray_gradients_of_others_have_no_effect():
    net, ctx = linear(), context()
    twin = copy.deepcopy(net)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    steps = [(ctx, net), (context(), twin)]
    batch = batch_of()
    for run, module in steps:
        run.update(
            "student", module, squares, batch, run.optimizer("s", module.parameters(), sgd())
        )
    assert torch.equal(weights(net), weights(twin))


def test_one_update_may_step_several_optimizers():
    first, second, ctx = linear(), linear(1, width=2), context()
    both = nn.Sequential(first, second)
    made = [ctx.optimizer(str(i), net.parameters(), sgd()) for i, net in enumerate((first, second))]
    before = weights(first), weights(second)
    ctx.update("auxiliary", both, squares, batch_of(), *made)
    assert not torch.equal(weights(first), before[0])
    assert not torch.equal(weights(second), before[1])
    assert ctx.progress.steps == 1


def test_frozen_parameters_of_an_optimizer_stay():
    net, ctx = linear(), context()
    net.bias.requires_grad_(False)
    before = net.bias.clone()
    optimizer = ctx.optimizer("student", net.parameters(), sgd())
    ctx.update("student", net, squares, batch_of(), optimizer)
    assert torch.equal(net.bias, before)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_clip_bounds_the_norm_over_all_parameters(clip):
    net, ctx, batch = linear(), context(), batch_of()
    optimizer = ctx.optimizer("student", net.parameters(), sgd(1.0))
    grads = torch.autograd.grad(squares(net, batch).total, list(net.parameters()))
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    assert 1e-2 < norm < 1e2
    before = weights(net)
    ctx.update("student", net, squares, batch, optimizer, clip=clip)
    # 1e-6: clip_grad_norm_ adds that to the norm it divides by.
    moved = (weights(net) - before).norm()
    torch.testing.assert_close(moved, min(norm, torch.tensor(clip).double()), rtol=1e-3, atol=0)


@pytest.mark.parametrize("accumulate", [2, 3, 4, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_accumulating_equals_the_whole_batch_without_batchnorm(accumulate, weighted):
    batch = batch_of(7)
    if weighted:
        batch = batch.weighted(torch.linspace(-1, 2, 7, dtype=torch.float64))
    nets, steps = [linear(), linear()], []
    for net, slices in zip(nets, (1, accumulate), strict=True):
        ctx = context()
        optimizer = ctx.optimizer("student", net.parameters(), sgd())
        steps.append(
            ctx.update("student", net, squares, batch, optimizer, accumulate=slices, clip=0.1)
        )
    # float64: only the order of the sum differs.
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), rtol=0, atol=1e-12)
    whole, sliced = (step.loss for step in steps)
    torch.testing.assert_close(whole.total, sliced.total, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.terms["squares"], sliced.terms["squares"], rtol=0, atol=1e-12)
    assert torch.equal(whole.inputs, sliced.inputs)
    torch.testing.assert_close(whole.student.logits, sliced.student.logits)
    assert torch.equal(whole.teacher.logits, sliced.teacher.logits)


def test_accumulating_needs_at_least_one_slice():
    net, ctx = linear(), context()
    optimizer = ctx.optimizer("student", net.parameters(), sgd())
    with pytest.raises(ContractError, match="accumulate=0 for a batch of 6 rows"):
        ctx.update("student", net, squares, batch_of(), optimizer, accumulate=0)


def test_more_slices_than_rows_are_as_many_as_rows():
    # A plug-in may leave fewer rows than a method asked slices for.
    batch, after = batch_of(), []
    for accumulate in (6, 7):
        net, ctx = linear(), context()
        optimizer = ctx.optimizer("student", net.parameters(), sgd())
        ctx.update("student", net, squares, batch, optimizer, accumulate=accumulate)
        after.append(weights(net))
    assert torch.equal(*after)


def test_a_student_update_without_inputs_is_refused():
    net, ctx = linear(), context()
    optimizer = ctx.optimizer("student", net.parameters(), sgd())
    with pytest.raises(ContractError, match="empty batch"):
        ctx.update("student", net, squares, Batch(), optimizer)


def test_an_update_that_reaches_nothing_is_refused():
    net, other, ctx = linear(), linear(1), context()
    optimizer = ctx.optimizer("other", other.parameters(), sgd())
    with pytest.raises(ContractError, match="reached none of its 2 parameters"):
        ctx.update("student", net, squares, batch_of(), optimizer)


def test_following_twice_leaves_one_gradient():
    class Twice(Plain):
        def student_gradient(self, update, following):
            following()
            return following()

    after = []
    for plugins in ({}, {"twice": Twice()}):
        net, ctx = linear(), context(plugins)
        optimizer = ctx.optimizer("student", net.parameters(), sgd())
        torch.manual_seed(3)
        ctx.update("student", net, squares, batch_of(), optimizer)
        after.append(weights(net))
    assert torch.equal(*after)


def test_a_plug_in_may_follow_on_another_batch():
    class Doubled(Plain):
        def student_gradient(self, update, following):
            return following(update.batch.joined(update.batch.inputs + 1))

    torch.manual_seed(3)
    batch = batch_of()
    both = Batch(torch.cat([batch.inputs, batch.inputs + 1]))
    after = []
    for plugins, seen in (({"doubled": Doubled()}, batch), ({}, both)):
        net, ctx = linear(), context(plugins)
        optimizer = ctx.optimizer("student", net.parameters(), sgd())
        ctx.update("student", net, squares, seen, optimizer)
        after.append(weights(net))
    assert torch.equal(*after)


def test_names_and_streams_of_a_plug_in_are_its_own():
    ctx = context()
    scoped, other = ScopedContext(ctx, "plugin/one"), ScopedContext(ctx, "plugin/two")
    net = linear()
    ctx.optimizer("student", net.parameters(), sgd())
    scoped.optimizer("student", net.parameters(), sgd())
    draws = [torch.randn(3, generator=c.generator("noise")) for c in (ctx, scoped, other)]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    before = ctx.rng.get_state()
    torch.randn(3, generator=scoped.rng)
    assert torch.equal(ctx.rng.get_state(), before)
    assert (scoped.progress, scoped.device) == (ctx.progress, ctx.device)


def test_moments_of_channels_last_weights_are_restored_where_they_belong():
    def net():
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    def step(model, ctx, optimizer, count):
        for _ in range(count):
            ctx.update("student", model, images, Batch(torch.ones(2, 3, 5, 5)), optimizer)

    def images(model, batch):
        total = model(batch.inputs).square().mean()
        return Loss({"squares": total}, total)

    make = optim.factory("adam", 0.01)
    whole, killed, resumed = net(), net(), net()
    ctx = context()
    step(whole, ctx, ctx.optimizer("s", whole.parameters(), make), 4)
    ctx = context()
    step(killed, ctx, ctx.optimizer("s", killed.parameters(), make), 2)
    tensors: dict[str, Tensor] = {}
    tree = encode(ctx.state(), tensors)
    saved = decode(tree, load(tensors_to_bytes(tensors)))
    resumed.load_state_dict(killed.state_dict())
    ctx = context()
    optimizer = ctx.optimizer("s", resumed.parameters(), make)
    ctx.restore(saved, complete=True)
    step(resumed, ctx, optimizer, 2)
    assert torch.equal(resumed.weight, whole.weight)


def test_a_misspelt_role_does_not_escape_the_plug_ins():
    ctx, model = context(), linear()
    optimizer = ctx.optimizer("student", model.parameters(), sgd())
    before = weights(model)
    with pytest.raises(ContractError, match="got role 'studnet', expected one of source, student"):
        ctx.update("studnet", model, squares, batch_of(), optimizer)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="got role 'studnet'"):
        ctx.apply("studnet", {}, optimizer)  # type: ignore[arg-type]
    assert torch.equal(weights(model), before)


def test_an_update_needs_an_optimizer():
    with pytest.raises(ContractError, match="got no optimizer"):
        context().update("student", linear(), squares, batch_of())


def test_gradients_are_reduced_after_the_plug_ins_and_before_clipping():
    net, order = linear(), []

    class Middle(Plain):
        def student_gradient(self, update, following):
            loss = following()
            order.append("plug-in")
            return loss

    def reduce(params: list[nn.Parameter]) -> None:
        order.append("reduce")
        for parameter in params:
            parameter.grad *= 1e6

    ctx = context({"middle": Middle()}, reduce=reduce)
    optimizer = ctx.optimizer("student", net.parameters(), sgd(1.0))
    before = weights(net)
    ctx.update("student", net, squares, batch_of(), optimizer, clip=0.5)
    assert order == ["plug-in", "reduce"]
    assert float((weights(net) - before).norm()) == pytest.approx(0.5, rel=1e-5)


def test_apply_steps_on_given_gradients():
    net, ctx = linear(), context()
    optimizer = ctx.optimizer("generator", net.parameters(), sgd(0.5))
    before, bias = net.weight.detach().clone(), net.bias.detach().clone()
    grad = torch.randn(2, 3, dtype=torch.float64)
    net.bias.grad = torch.ones(2, dtype=torch.float64)
    step = ctx.apply("source", {net.weight: grad}, optimizer)
    assert step == Step("source")
    assert torch.equal(net.weight.detach(), before - 0.5 * grad)
    assert torch.equal(net.bias.detach(), bias), "a stray gradient was applied"
    assert net.weight.grad is None
    assert ctx.progress.steps == 1


def test_apply_refuses_gradients_that_nobody_would_step():
    net, other, ctx = linear(), linear(1), context()
    optimizer = ctx.optimizer("generator", net.parameters(), sgd())
    with pytest.raises(ContractError, match="gradients for 2 parameters"):
        ctx.apply("source", {p: torch.zeros_like(p) for p in other.parameters()}, optimizer)


# Plug-ins (rule 7)


class Plain:
    """What all plug-ins here share."""

    Config = BaseModel
    requires = Requires()

    def setup(self, task: Any, teachers: Any, student: nn.Module, ctx: Any) -> None: ...

    def parts(self) -> dict[str, Any]:
        return {}


class Recorder(Plain):
    """Notes when it is called and when what it wraps has returned."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def student_gradient(self, update: StudentUpdate, following: Callable[[], Loss]) -> Loss:
        self.log.append(f"{self.name} in")
        loss = following()
        self.log.append(f"{self.name} out")
        return loss


def test_gradient_plug_ins_nest_in_order():
    log: list[str] = []
    net, ctx = linear(), context({name: Recorder(name, log) for name in ("outer", "inner")})

    def loss_fn(model: Any, batch: Batch) -> Loss:
        log.append("loss")
        return squares(model, batch)

    optimizer = ctx.optimizer("student", net.parameters(), sgd())
    ctx.update("student", net, loss_fn, batch_of(), optimizer)
    assert log == ["outer in", "inner in", "loss", "inner out", "outer out"]
    assert ctx.hooks.called == {"outer", "inner"}


@pytest.mark.parametrize("role", ["source", "auxiliary"])
def test_student_hooks_touch_no_other_role(role):
    log: list[str] = []

    class Everything(Recorder):
        def student_batch(self, batch):
            log.append("batch")
            return batch

        def student_optimizers(self, given):
            log.append("optimizers")
            return given

        def source_terms(self, loss, batch):
            log.append("terms")
            return {}

    net, ctx = linear(), context({"all": Everything("gradient", log)})
    optimizer = ctx.optimizer("some", net.parameters(), sgd())
    ctx.update(role, net, squares, batch_of(), optimizer)
    assert log == (["terms"] if role == "source" else [])


def test_a_gradient_plug_in_decides_the_gradient():
    class Halve(Plain):
        def student_gradient(self, update, following):
            loss = following()
            for parameter in update.params.values():
                assert parameter.grad is not None
                parameter.grad /= 2
            return loss

    def moved(plugins: dict[str, Any]) -> Tensor:
        net, ctx = linear(), context(plugins)
        before = weights(net)
        optimizer = ctx.optimizer("student", net.parameters(), sgd())
        batch = Batch(inputs=torch.ones(2, 3, dtype=torch.float64))
        ctx.update("student", net, squares, batch, optimizer)
        return weights(net) - before

    torch.testing.assert_close(moved({"a": Halve(), "b": Halve()}), moved({}) / 4)


def test_a_gradient_plug_in_sees_the_update_as_it_is():
    net, seen = linear(), []

    class Look(Plain):
        def student_batch(self, batch):
            return batch.rows(slice(0, 4))

        def student_gradient(self, update, following):
            seen.append(update)
            return following()

    ctx = context({"look": Look()})
    optimizer = ctx.optimizer("student", net.parameters(), sgd())
    ctx.update("student", net, squares, batch_of(6), optimizer)
    (update,) = seen
    assert update.model is net
    assert update.loss_fn is squares
    assert len(update.batch) == 4
    assert {name: id(p) for name, p in update.params.items()} == {
        name: id(p) for name, p in net.named_parameters()
    }


def test_evaluating_elsewhere_moves_live_statistics_once_per_update(tiny_student):
    # Rule 8, in the form a bilevel plug-in uses it.
    class Elsewhere(Plain):
        def student_gradient(self, update, following):
            loss = following()
            moved = {n: (p - 0.1 * p.grad).detach() for n, p in update.params.items()}
            update.loss_fn(functional(update.model, moved), update.batch)
            return loss

    norm, ctx = tiny_student[1], context({"elsewhere": Elsewhere()})
    optimizer = ctx.optimizer("student", tiny_student.parameters(), sgd())
    inputs = torch.randn(4, 1, 8, 8)
    expected = copy.deepcopy(tiny_student)
    expected(inputs)
    ctx.update("student", tiny_student, squares, Batch(inputs=inputs), optimizer)
    assert int(norm.num_batches_tracked) == 1
    torch.testing.assert_close(norm.running_mean, expected[1].running_mean)


def test_batches_go_through_the_plug_ins_in_order():
    class Times(Plain):
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def student_batch(self, batch):
            rows = batch.rows(slice(0, len(batch) - 1))
            return rows.weighted(torch.full((len(rows),), self.factor, dtype=torch.float64))

    net, batch = linear(), batch_of(6)
    ctx = context({"two": Times(2.0), "three": Times(-3.0)})
    optimizer = ctx.optimizer("student", net.parameters(), sgd())
    expected = -6 * net(batch.inputs[:4]).square().mean().item()
    step = ctx.update("student", net, squares, batch, optimizer)
    assert float(step.loss.total) == pytest.approx(expected, rel=1e-12)
    assert len(batch) == 6


def test_source_terms_are_added_with_gradient():
    class Pull(Plain):
        def source_terms(self, loss, batch):
            return {"pull": 2 * loss.inputs.mean()}

    def loss_fn(model: Any, batch: Batch) -> Loss:
        made = model(batch.inputs)
        return Loss({"own": made.sum() * 0}, made.sum() * 0, made)

    net, ctx = linear(), context({"pull": Pull()})
    optimizer = ctx.optimizer("generator", net.parameters(), sgd(1.0))
    bias = net.bias.detach().clone()
    step = ctx.update("source", net, loss_fn, batch_of(), optimizer)
    assert set(step.loss.terms) == {"own", "pull"}
    assert torch.equal(step.loss.total, step.loss.terms["pull"])
    # d(2 mean)/d(bias) = 2 / 2 outputs.
    torch.testing.assert_close(net.bias.detach(), bias - 1)


class OwnOptimizer(Plain):
    """Takes the student over with another optimizer from the given step on."""

    def __init__(self, begin: int) -> None:
        self.begin = begin

    def setup(self, task: Any, teachers: Any, student: nn.Module, ctx: Any) -> None:
        self.ctx = ctx
        self.optimizer = ctx.optimizer("own", [student.bias], sgd(1.0))

    def student_optimizers(self, given, clip):
        late = self.ctx.progress.steps >= self.begin
        return ([self.optimizer], None) if late else (given, clip)


def test_a_plug_in_may_bring_its_own_optimizer():
    net, plugin = linear(), OwnOptimizer(1)
    ctx = context({"own": plugin})
    plugin.setup(None, [], net, ctx)
    optimizer = ctx.optimizer("student", net.parameters(), sgd())
    weight = [net.weight.detach().clone()]
    bias = [net.bias.detach().clone()]
    for _ in range(2):
        ctx.update("student", net, squares, batch_of(), optimizer)
        weight.append(net.weight.detach().clone())
        bias.append(net.bias.detach().clone())
    assert not torch.equal(weight[0], weight[1])
    assert torch.equal(weight[1], weight[2])
    assert not torch.equal(bias[1], bias[2])
    assert set(ctx.state()["optimizers"]) == {"own", "student"}
    ctx.update("source", net, squares, batch_of(), optimizer)
    assert not torch.equal(net.weight.detach(), weight[2]), "the plug-in took over a source step"


class Ones(Plain):
    def student_batch(self, batch):
        return batch.weighted(torch.ones(len(batch), dtype=torch.float64))


def blind(model: Any, batch: Batch) -> Loss:
    """Takes the plain mean and so ignores weights."""
    total = predict(model, batch.inputs).logits.square().mean()
    return Loss({"squares": total}, total)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_that_a_loss_ignores_are_an_error(accumulate):
    net, ctx = linear(), context({"ones": Ones()})
    optimizer = ctx.optimizer("student", net.parameters(), sgd())
    with pytest.raises(ContractError, match=r"did not use them.*batch\.mean"):
        ctx.update("student", net, blind, batch_of(), optimizer, accumulate=accumulate)


def test_ignored_weights_are_noticed_on_a_batch_that_was_used_before():
    net, ctx, batch = linear(), context({"ones": Ones()}), batch_of()
    optimizer = ctx.optimizer("student", net.parameters(), sgd())
    ctx.update("auxiliary", net, squares, batch, optimizer)
    with pytest.raises(ContractError, match="did not use them"):
        ctx.update("student", net, blind, batch, optimizer)


def test_a_batch_without_rows_left_is_no_step():
    class Nothing(Plain):
        def student_batch(self, batch):
            return batch.rows(slice(0, 0))

    net, ctx = linear(), context({"nothing": Nothing()})
    optimizer = ctx.optimizer("student", net.parameters(), sgd())
    before = weights(net)
    step = ctx.update("student", net, squares, batch_of(), optimizer)
    assert step == Step("student")
    assert torch.equal(weights(net), before)
    assert ctx.progress.steps == 0


class Smallest:
    """A method of student steps, some of them outside of `ctx.update`."""

    Config = BaseModel
    requires = Requires()

    def __init__(self, student: nn.Module, roles: str) -> None:
        self.student, self.roles = student, roles

    def parts(self) -> dict[str, Any]:
        return {"student": self.student}

    def run(self, ctx: RunContext) -> Iterator[Step]:
        optimizer = ctx.optimizer("student", self.student.parameters(), sgd())
        for index in ctx.rounds("loop", 3):
            role = {"s": "student", "g": "source"}[self.roles[index]]
            yield ctx.update(role, self.student, squares, batch_of(), optimizer)

    def result(self) -> Result:
        return Result("student", self.student)

    def passes(self, cfg: Any) -> Mapping[str, float]:
        return {}


class Terms(Plain):
    def source_terms(self, loss, batch):
        return {}


@pytest.mark.parametrize(
    ("roles", "steps"), [("sss", 3), ("gsg", None), ("gss", None), ("ssg", None)], ids=str
)
def test_a_plug_in_that_is_never_called_is_an_error(roles, steps):
    student = linear()
    trainer = Trainer(
        Smallest(student, roles),
        Classification(InputSpec("vector", (3,)), 2),
        student=student,
        plugins={"terms": Terms()},
        config=TrainerConfig(device="cpu"),
    )
    if steps is None:
        assert trainer.run().steps == 3
        return
    with pytest.raises(ContractError, match=r"\['terms'\] were never called; Smallest"):
        trainer.run()
    assert trainer.ctx.progress.steps == steps


def test_a_student_plug_in_waits_for_the_first_round_that_steps_the_student():
    def run(roles: str) -> int:
        student = linear()
        trainer = Trainer(
            Smallest(student, roles),
            Classification(InputSpec("vector", (3,)), 2),
            student=student,
            plugins={"ones": Ones()},
            config=TrainerConfig(device="cpu"),
        )
        return trainer.run().steps

    assert run("ggs") == 3
    with pytest.raises(ContractError, match="were never called"):
        run("ggg")


# Schedules (rule 9)


def test_rates_change_at_round_ends():
    net, ctx = linear(), context()
    optimizer = ctx.optimizer("student", net.parameters(), sgd(0.2), multistep((0.5, 0.75)))
    rates = []
    for _ in ctx.rounds("loop", 4):
        for _ in range(3):
            ctx.update("student", net, squares, batch_of(), optimizer)
            rates.append(optimizer.param_groups[0]["lr"])
    expected = [0.2] * 6 + [0.02] * 3 + [0.002] * 3
    assert rates == pytest.approx(expected)


def test_rates_per_step_change_after_each_step_of_their_own_optimizer():
    net, ctx = linear(), context()
    schedule = cosine(per="step", steps=8)
    optimizer = ctx.optimizer("student", net.parameters(), sgd(0.2), schedule)
    other = ctx.optimizer("other", net.parameters(), sgd(0.2), cosine())
    rates = []
    for _ in ctx.rounds("loop", 2):
        for _ in range(4):
            rates.append(optimizer.param_groups[0]["lr"])
            ctx.update("student", net, squares, batch_of(), optimizer)
            ctx.update("auxiliary", net, squares, batch_of(), other)
    assert rates == pytest.approx([0.2 * schedule.factor(step / 8) for step in range(8)])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_each_group_keeps_its_base_rate():
    net, ctx = linear(), context()

    def groups(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [{"params": params[:1], "lr": 1.0}, {"params": params[1:], "lr": 0.01}]
        )

    optimizer = ctx.optimizer("student", net.parameters(), groups, multistep((0.5,)))
    list(ctx.rounds("loop", 2))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.001])


def test_a_resumed_loop_has_the_rate_of_its_round():
    ctx, net = context(on_loop=lambda name, n: 2), linear()
    optimizer = ctx.optimizer("student", net.parameters(), sgd(0.2), multistep((0.5,)))
    assert optimizer.param_groups[0]["lr"] == 0.2
    for _ in ctx.rounds("loop", 4):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
