"""DFAD's invariants, from the paper and its reference code."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vestige.core import schedules
from vestige.core.types import Batch, InputSpec, Step
from vestige.errors import NoBatchNormError
from vestige.methods._fakes import as_inputs
from vestige.methods.dfad import DFAD, DFADConfig
from vestige.methods.kd import KD, KDConfig
from vestige.models.factory import build_model
from vestige.recipes.build import build_method
from vestige.sources.generator import GeneratorSource
from vestige.sources.views import viewed
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.context import RunContext

SPEC = InputSpec.image(1, 8, 8)
SMALL = {
    "rounds": 2,
    "iterations": 2,
    "batch_size": 8,
    "generator_width": 4,
    "latent_dim": 8,
    "schedule": "constant",
}


class Dense:
    """A task whose answers are one class per pixel; only what a method reads."""

    kind = "segmentation"
    metric = "miou"
    spec = SPEC
    num_classes = 3


class Shifted(nn.Module):
    """Another network's logits plus a constant."""

    def __init__(self, network: nn.Module, shift: float) -> None:
        super().__init__()
        self.network, self.shift = network, shift

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs) + self.shift


def make(
    teacher: nn.Module, student: nn.Module, task: Any = None, seed: int = 0, **settings: Any
) -> DFAD:
    torch.manual_seed(seed)  # decides the generator's weights
    cfg = DFADConfig(**{**SMALL, **settings})
    return DFAD(cfg, task or Classification(SPEC, 3), [WhiteBoxTeacher(teacher)], student, {})


def context(on_round: Callable[[], bool] = lambda: True, seed: int = 0) -> RunContext:
    return RunContext(
        seed=seed,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=on_round,
    )


def run(method: Any) -> list[Step]:
    return list(method.run(context()))


def noise(rows: int = 8) -> Batch:
    return Batch(latent=torch.randn(rows, 8, generator=torch.Generator().manual_seed(5)))


def gradients(loss: Tensor, network: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.parameters())))


def doubled(method: DFAD) -> DFAD:
    """Everything in float64, where a statement about arithmetic holds to 1e-12."""
    for module in (method.teacher, method.student, method.generator):
        module.double()
    return method


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# What the paper says


@pytest.mark.parametrize("log_form", [False, True])
def test_a_student_that_equals_the_teacher_leaves_nothing_to_do(tiny_teacher, log_form):
    student = copy.deepcopy(tiny_teacher).requires_grad_(True)
    method = make(tiny_teacher, student, log_form=log_form)
    loss = method.generation(method.generator, noise())
    assert loss.total.item() == 0
    assert all(not grad.any() for grad in gradients(loss.total, method.generator))
    imitated = method.imitation(student, Batch(inputs=loss.inputs.detach()))
    assert imitated.total.item() == 0
    assert all(not grad.any() for grad in gradients(imitated.total, student))


def test_a_generation_step_on_zero_gradients_moves_no_weight(tiny_teacher):
    method = make(tiny_teacher, copy.deepcopy(tiny_teacher).requires_grad_(True))
    ctx, before = context(), state_of(method.generator)
    optimizer = ctx.optimizer(
        "generator",
        method.generator.parameters(),
        lambda params: torch.optim.Adam(params, 1e-3),
    )
    ctx.update("source", method.generator, method.generation, noise(), optimizer)
    for name, weight in method.generator.named_parameters():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("shift", [2.0, -0.5])
def test_a_constant_offset_has_the_losses_of_the_paper(tiny_teacher, shift):
    student = Shifted(copy.deepcopy(tiny_teacher), shift)
    plain = doubled(make(tiny_teacher, student, log_form=False))
    logged = doubled(make(tiny_teacher, student, log_form=True))
    latent = Batch(latent=noise().latent.double())
    generated = plain.generation(plain.generator, latent)
    # With c = 2: -2 and -log 3. Rounding of float64 is the only error.
    assert generated.total.item() == pytest.approx(-abs(shift), abs=1e-12)
    form = logged.generation(logged.generator, latent)
    assert form.total.item() == pytest.approx(-math.log(abs(shift) + 1), abs=1e-12)
    imitated = plain.imitation(student, Batch(inputs=generated.inputs.detach()))
    assert imitated.total.item() == pytest.approx(abs(shift), abs=1e-12)


def test_the_log_form_divides_the_generators_gradient_by_d_plus_1(tiny_teacher, tiny_student):
    plain = doubled(make(tiny_teacher, tiny_student, log_form=False))
    logged = doubled(make(tiny_teacher, tiny_student, log_form=True))
    latent = Batch(latent=noise().latent.double())
    first = plain.generation(plain.generator, latent)
    second = logged.generation(logged.generator, latent)
    divisor = 1 - first.total.item()
    assert divisor > 1.05
    pairs = zip(
        gradients(first.total, plain.generator),
        gradients(second.total, logged.generator),
        strict=True,
    )
    for one, other in pairs:
        # dfad.md asks for 1e-6; biases before a BatchNorm have a zero gradient up to rounding.
        torch.testing.assert_close(other, one / divisor, rtol=1e-6, atol=1e-14)


def test_the_discrepancy_is_the_mean_over_batch_and_classes(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    inputs = torch.randn(8, 1, 8, 8)
    loss = method.imitation(tiny_student.eval(), Batch(inputs=inputs))
    total = 0.0
    for row in range(8):
        for label in range(3):
            s = tiny_student(inputs)[row, label].item()
            total += abs(s - tiny_teacher(inputs)[row, label].item())
    # 24 float32 terms of size 1: an error of 1e-6 is rounding.
    assert loss.total.item() == pytest.approx(total / 24, abs=1e-6)


def test_each_step_changes_its_own_network_alone(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    nets = {"teacher": method.teacher, "student": tiny_student, "generator": method.generator}

    def weights(name: str) -> dict[str, Tensor]:
        return {key: value.detach().clone() for key, value in nets[name].named_parameters()}

    teacher = state_of(method.teacher)
    roles = []
    before = {name: weights(name) for name in nets}
    for step in method.run(context()):
        roles.append(step.role)
        after = {name: weights(name) for name in nets}
        moved = {name for name in nets if not same(before[name], after[name])}
        assert moved == {"student" if step.role == "student" else "generator"}
        assert same(teacher, state_of(method.teacher)), "a buffer or weight of the teacher moved"
        assert all(p.grad is None for net in nets.values() for p in net.parameters())
        before = after
    # Five imitations, then one generation, as in the reference code.
    assert roles == (["student"] * 5 + ["source"]) * 4


def test_passes_of_one_iteration_are_those_of_the_spec(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, rounds=1, iterations=1)
    counts: Counter[str] = Counter()

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            counts[f"{name} forward"] += 1
            answer = getattr(output, "logits", output)
            if answer.requires_grad:
                kind = "to input" if args[0].requires_grad else "full"
                answer.register_hook(lambda grad: counts.update([f"{name} backward {kind}"]))

        module.register_forward_hook(hook)

    watch("generator", method.generator)
    watch("teacher", method.teacher)
    watch("student", tiny_student)
    roles = Counter(step.role for step in run(method))
    assert roles == {"student": 5, "source": 1}
    assert counts == {
        "generator forward": 6,
        "teacher forward": 6,
        "student forward": 6,
        "teacher backward to input": 1,
        "generator backward full": 1,
        "student backward full": 5,
        "student backward to input": 1,
    }


def test_every_step_has_fresh_noise(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    seen: list[Tensor] = []
    method.generator.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    steps = run(method)
    assert len(seen) == len(steps)
    assert all(latent.shape == (8, 8) for latent in seen)
    assert len({tuple(latent.flatten().tolist()) for latent in seen}) == len(seen)
    values = torch.cat(seen).flatten()
    # 1536 draws of N(0, 1): five deviations of their mean and of their standard deviation.
    assert abs(float(values.mean())) < 5 / math.sqrt(len(values))
    assert abs(float(values.std()) - 1) < 5 / math.sqrt(2 * len(values))


def test_networks_are_in_the_modes_of_the_reference_code(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student.eval())
    method.generator.eval()
    modes: set[tuple[bool, bool, bool]] = set()
    method.teacher.register_forward_hook(
        lambda module, args, output: modes.add(
            (module.module[1].training, tiny_student[1].training, method.generator.training)
        )
    )
    run(method)
    assert modes == {(False, True, True)}


def test_the_defaults_are_the_reference_codes_for_cifar():
    cfg = DFADConfig()
    assert (cfg.batch_size, cfg.latent_dim, cfg.generator_width) == (256, 256, 64)
    assert (cfg.rounds, cfg.iterations, cfg.student_steps) == (500, 50, 5)
    assert (cfg.student_optimizer, cfg.student_lr, cfg.student_weight_decay) == ("sgd", 0.1, 5e-4)
    assert cfg.generator_lr == 1e-3
    # MultiStep at 100 and 200 of 500 epochs, x0.1.
    schedule = schedules.named(cfg.schedule, cfg.milestones)
    assert schedule is not None
    rates = [schedule.factor(done / 500) for done in (0, 99, 100, 199, 200, 499)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert (cfg.bn_weight, cfg.balance_weight, cfg.replay, cfg.student_mode) == (0, 0, 0, "train")
    assert cfg.log_form is None


# Limits in which it equals something else


def test_imitation_is_kd_with_the_l1_loss(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    kd = KD(
        KDConfig(loss="l1"), Classification(SPEC, 3), [method.teacher], tiny_student, {"inputs": ()}
    )
    inputs = torch.randn(8, 1, 8, 8)
    ours, theirs = (side.imitation(tiny_student, Batch(inputs=inputs)) for side in (method, kd))
    assert torch.equal(ours.total, theirs.total)
    for one, other in zip(
        gradients(ours.total, tiny_student), gradients(theirs.total, tiny_student), strict=True
    ):
        assert torch.equal(one, other)


def test_before_its_first_generation_step_it_is_kd_on_an_untrained_generator(
    tiny_teacher, tiny_student
):
    other = copy.deepcopy(tiny_student)
    method = make(tiny_teacher, tiny_student, student_steps=4, rounds=1, iterations=1)
    source = GeneratorSource(copy.deepcopy(method.generator))
    kd = KD(
        KDConfig(loss="l1", rounds=1, iterations=4, batch_size=8, schedule="constant"),
        Classification(SPEC, 3),
        [method.teacher],
        other,
        {"inputs": source},
    )
    steps = method.run(context())
    for _ in range(4):
        assert next(steps).role == "student"
    run(kd)
    assert same(state_of(tiny_student), state_of(other))
    assert same(state_of(method.generator), source.generator.state_dict())


def test_dense_answers_are_many_answers(tiny_student):
    torch.manual_seed(3)
    teacher, student = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1)
    dense = doubled(make(teacher, student, Dense()))
    flat = doubled(make(teacher, student))
    assert dense.log_form
    assert not flat.log_form
    inputs = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    # One row per pixel; a 1x1 convolution sees no neighbours.
    pixels = inputs.movedim(1, -1).reshape(-1, 1, 1, 1)

    def flattened(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: module(x).flatten(1)

    whole = dense.imitation(student, Batch(inputs=inputs))
    flat.teacher = flattened(dense.teacher.module)
    split = flat.imitation(flattened(student), Batch(inputs=pixels))
    torch.testing.assert_close(whole.total, split.total, rtol=1e-12, atol=0)

    generated = dense.generation(dense.generator, Batch(latent=noise().latent.double()))
    distance = (generated.student.logits - generated.teacher.logits).abs().mean()
    # The published form for segmentation.
    torch.testing.assert_close(generated.total, -torch.log(distance + 1), rtol=1e-12, atol=0)


def test_dense_prediction_runs_and_learns_in_one_file(tiny_student):
    torch.manual_seed(3)
    teacher, student = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 3, 3, padding=1)
    method = make(teacher, student, Dense(), iterations=15, student_lr=0.05)
    losses = [step.loss.total.item() for step in run(method) if step.role == "student"]
    # The student has the teacher's form, so it can agree; a tenth is far from chance.
    assert np.mean(losses[-10:]) < 0.1 * np.mean(losses[:3])


# Options


def test_without_options_the_generator_has_one_term(tiny_teacher, tiny_student):
    for step in run(make(tiny_teacher, tiny_student)):
        assert step.loss is not None
        expected = {"disagreement"} if step.role == "student" else {"adversarial"}
        assert set(step.loss.terms) == expected
        assert torch.equal(step.loss.total, next(iter(step.loss.terms.values())))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_student_mode_decides_whether_a_generation_step_moves_its_statistics(
    tiny_teacher, tiny_student, mode
):
    method = make(tiny_teacher, tiny_student, student_mode=mode)
    tiny_student.train()
    before = state_of(tiny_student)
    weighed = method.generation(method.generator, noise())
    after = state_of(tiny_student)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert moved == (statistics if mode == "train" else set())
    assert all(layer.training for layer in tiny_student.modules())
    # In eval mode the answer does not depend on the other rows.
    alone = tiny_student.eval()(weighed.inputs.detach())
    assert torch.allclose(alone, weighed.student.logits, atol=1e-5) == (mode == "eval")


def test_student_mode_eval_respects_what_was_frozen(tiny_teacher, tiny_student):
    tiny_student.train()
    tiny_student[1].eval()
    method = make(tiny_teacher, tiny_student, student_mode="eval")
    method.generation(method.generator, noise())
    assert [layer.training for layer in tiny_student] == [True, False, True, True, True, True]


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_bn_weight_adds_that_much_of_the_statistics_term(tiny_teacher, tiny_student, weight):
    plain = doubled(make(tiny_teacher, tiny_student))
    method = doubled(make(tiny_teacher, tiny_student, bn_weight=weight))
    latent = Batch(latent=noise().latent.double())
    without = plain.generation(plain.generator, latent)
    loss = method.generation(method.generator, latent)

    seen = tiny_teacher[0](loss.inputs).detach().numpy()
    mean = [seen[:, c].mean() for c in range(8)]
    var = [((seen[:, c] - mean[c]) ** 2).mean() for c in range(8)]
    norm = tiny_teacher[1]
    slow = math.sqrt(sum((m - float(r)) ** 2 for m, r in zip(mean, norm.running_mean, strict=True)))
    slow += math.sqrt(sum((v - float(r)) ** 2 for v, r in zip(var, norm.running_var, strict=True)))
    assert slow > 0.1
    assert loss.terms["bn_statistics"].item() == pytest.approx(slow, rel=1e-9)
    assert loss.total.item() == pytest.approx(without.total.item() + weight * slow, rel=1e-9)
    assert torch.equal(loss.terms["adversarial"], without.terms["adversarial"])


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_balance_weight_adds_that_much_of_the_balance_term(tiny_teacher, tiny_student, weight):
    plain = doubled(make(tiny_teacher, tiny_student))
    method = doubled(make(tiny_teacher, tiny_student, balance_weight=weight))
    latent = Batch(latent=noise().latent.double())
    without = plain.generation(plain.generator, latent)
    loss = method.generation(method.generator, latent)

    logits = loss.teacher.logits.detach().numpy()
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    slow = sum(p * math.log(p) for p in probs.mean(0))
    assert -math.log(3) <= slow < -1e-3
    assert loss.terms["class_balance"].item() == pytest.approx(slow, rel=1e-9)
    assert loss.total.item() == pytest.approx(without.total.item() + weight * slow, rel=1e-9)


def test_options_leave_the_students_loss_alone(tiny_teacher, tiny_student):
    inputs = torch.randn(8, 1, 8, 8)
    plain = make(tiny_teacher, tiny_student)
    method = make(tiny_teacher, tiny_student, bn_weight=2, balance_weight=2, log_form=True)
    losses = [side.imitation(tiny_student, Batch(inputs=inputs)) for side in (plain, method)]
    assert torch.equal(losses[0].total, losses[1].total)
    assert set(losses[1].terms) == {"disagreement"}


def test_the_statistics_term_pulls_fakes_to_the_teachers_statistics(tiny_teacher, tiny_student):
    def distance(weight: float) -> float:
        settings = {"iterations": 30, "student_steps": 1, "generator_lr": 1e-2}
        method = make(tiny_teacher, copy.deepcopy(tiny_student), bn_weight=weight, **settings)
        run(method)
        measured = make(tiny_teacher, tiny_student, bn_weight=1)
        measured.generator.load_state_dict(method.generator.state_dict())
        measured.generator.train()
        loss = measured.generation(measured.generator, noise(64)).detach()
        return loss.terms["bn_statistics"].item()

    # Well apart: with the weight it is the main term, without it nothing holds the statistics.
    assert distance(10.0) < 0.8 * distance(0.0)


def test_bn_weight_needs_a_teacher_with_batchnorm_and_says_so_at_build():
    spec, settings = InputSpec.image(1, 16, 16), {**SMALL, "bn_weight": 1.0}
    teacher = WhiteBoxTeacher(build_model("lenet5", spec, 10))
    task, student = Classification(spec, 10), build_model("lenet5-half", spec, 10)
    with pytest.raises(NoBatchNormError, match="bn_weight: 0"):
        build_method("dfad", DFADConfig(**settings), task, [teacher], student, {}, 0)
    settings["bn_weight"] = 0.0
    method = build_method("dfad", DFADConfig(**settings), task, [teacher], student, {}, 0)
    assert all(math.isfinite(step.loss.total.item()) for step in run(method))


@pytest.mark.parametrize("log_form", [False, True])
def test_log_form_can_be_chosen_against_the_task(tiny_teacher, tiny_student, log_form):
    assert make(tiny_teacher, tiny_student, log_form=log_form).log_form is log_form
    assert make(tiny_teacher, tiny_student, Dense(), log_form=log_form).log_form is log_form


# Replay


def test_replay_takes_its_share_from_earlier_fakes(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, replay=0.25, replay_size=20)
    batches: list[Tensor] = []
    sizes: list[int] = []
    method.teacher.register_forward_hook(
        lambda module, args, output: batches.append(args[0].detach().clone())
    )
    method.generator.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    memories: list[set[tuple[float, ...]]] = []

    def rows(tensor: Tensor) -> set[tuple[float, ...]]:
        return {tuple(row.flatten().tolist()) for row in tensor}

    roles = []
    for step in method.run(context()):
        roles.append(step.role)
        # What the next batch can be drawn from.
        content = method.memory.state_dict()["rows"]
        memories.append(rows(content[: len(method.memory)]) if content is not None else set())

    replayed = [
        len([row for row in batches[index] if tuple(row.flatten().tolist()) in memories[index - 1]])
        for index in range(1, len(batches))
        if roles[index] == "student"
    ]
    # Nothing to replay in the first iteration, then 2 of 8 rows in every student step.
    assert replayed == [0] * 4 + [2] * 15
    students = [size for size, role in zip(sizes, roles, strict=True) if role == "student"]
    assert students == [8] * 5 + [6] * 15
    assert all(len(batch) == 8 for batch in batches)
    sources = [size for size, role in zip(sizes, roles, strict=True) if role == "source"]
    assert sources == [8] * 4
    # The last batch of each of four iterations was pushed: more than the memory holds.
    assert len(method.memory) == 20


def test_without_replay_the_memory_stays_empty_and_its_size_decides_nothing(
    tiny_teacher, tiny_student
):
    students = []
    for size in (1, 4096):
        student = copy.deepcopy(tiny_student)
        method = make(tiny_teacher, student, replay_size=size)
        run(method)
        assert len(method.memory) == 0
        assert method.memory.state_dict() == {"rows": None, "pushed": 0}
        students.append(state_of(student))
    assert same(*students)


# Rates


@pytest.mark.parametrize("schedule", ["constant", "multistep", "cosine"])
def test_both_rates_follow_the_schedule_at_round_ends(tiny_teacher, tiny_student, schedule):
    method = make(tiny_teacher, tiny_student, rounds=5, schedule=schedule, student_lr=0.1)
    made: dict[str, torch.optim.Optimizer] = {}
    ctx = context()
    ask = ctx.optimizer

    def spy(name: str, *args: Any, **given: Any) -> torch.optim.Optimizer:
        made[name] = ask(name, *args, **given)
        return made[name]

    ctx.optimizer = spy
    used: dict[int, set[tuple[float, float]]] = {}
    for _ in method.run(ctx):
        rates = tuple(made[name].param_groups[0]["lr"] for name in ("student", "generator"))
        used.setdefault(ctx.progress.round, set()).add(rates)
    factors = {
        "constant": [1, 1, 1, 1, 1],
        "multistep": [1, 0.1, 0.01, 0.01, 0.01],  # milestones at 0.2 and 0.4 of 5 rounds
        "cosine": [0.5 * (1 + math.cos(math.pi * done / 5)) for done in range(5)],
    }[schedule]
    for done, factor in enumerate(factors):
        assert len(used[done]) == 1, "a rate moved within a round"
        assert next(iter(used[done])) == pytest.approx((0.1 * factor, 1e-3 * factor))


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,)), ((0.3,), (0.2,))])
def test_generator_b_makes_inputs_of_whatever_statistics_the_teacher_has(tiny_student, mean, std):
    spec = InputSpec.image(1, 16, 16, mean=mean, std=std)
    teacher = WhiteBoxTeacher(build_model("convnet", spec, 3, widths=(4, 4)))
    cfg = DFADConfig(generator="dcgan", generator_width=4, latent_dim=8, batch_size=8)
    method = DFAD(cfg, Classification(spec, 3), [teacher], tiny_student, {})
    made = method.generator(torch.randn(8, 8))
    inputs = as_inputs(made, method.cfg, method.spec)
    # [-1, 1] stands for images in [0, 1]; for mean and std 0.5 the output is the input as it is.
    torch.testing.assert_close(spec.denormalize(inputs), (made + 1) / 2)
    if mean == (0.5,):
        torch.testing.assert_close(inputs, made)


def test_only_fresh_fakes_enter_the_memory(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, rounds=1, iterations=3, batch_size=8, replay=0.5)
    fresh = []
    inner = method.fakes

    def recorded(ctx):
        made, batch = inner(ctx)
        fresh.append(made)
        return made, batch

    method.fakes = recorded
    run(method)
    last = fresh[method.cfg.student_steps - 1 :: method.cfg.student_steps]
    # The first batch is all fresh, because there is nothing yet to replay.
    assert [len(made) for made in last] == [8, 4, 4]
    kept = method.memory.state_dict()
    assert kept["pushed"] == sum(len(made) for made in last)
    torch.testing.assert_close(kept["rows"][: kept["pushed"]], torch.cat(last))


class Scaled(nn.Module):
    """Another network's logits times a constant."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs) * self.factor


def test_relative_units_do_not_depend_on_the_size_of_the_logits(tiny_teacher, tiny_student):
    def losses(factor: float, units: str) -> list[float]:
        nets = (Scaled(copy.deepcopy(net), factor) for net in (tiny_teacher, tiny_student))
        method = doubled(make(*nets, units=units, bn_weight=1.0))
        loss = method.generation(method.generator, Batch(latent=noise().latent.double()))
        return [loss.terms[name].item() for name in ("adversarial", "bn_statistics")]

    assert losses(7.0, "relative") == pytest.approx(losses(1.0, "relative"), rel=1e-9)
    assert losses(7.0, "absolute")[0] == pytest.approx(7 * losses(1.0, "absolute")[0], rel=1e-9)


def test_the_scale_of_relative_units_is_a_constant_to_the_generator(tiny_teacher, tiny_student):
    # Otherwise the generator could gain by making the teacher's logits small.
    plain, relative = (
        doubled(make(tiny_teacher, tiny_student, units=units)) for units in ("absolute", "relative")
    )
    latent = Batch(latent=noise().latent.double())
    first = plain.generation(plain.generator, latent)
    second = relative.generation(relative.generator, latent)
    ratio = (first.total / second.total).item()
    for a, b in zip(
        gradients(first.total, plain.generator),
        gradients(second.total, relative.generator),
        strict=True,
    ):
        torch.testing.assert_close(a, b * ratio, rtol=1e-9, atol=1e-12)


def test_a_sigmoid_head_makes_images_in_the_teachers_space(tiny_student):
    spec = InputSpec.image(1, 8, 8, mean=[0.3], std=[0.2])
    teacher = build_model("convnet", spec, 3, widths=(4,))
    method = make(teacher, tiny_student, task=Classification(spec, 3), generator_head="sigmoid")
    method.generator.head[0].weight.data.mul_(1e3)
    inputs = method.generation(method.generator, noise()).inputs
    assert inputs.min().item() == pytest.approx((0 - 0.3) / 0.2, abs=1e-4)
    assert inputs.max().item() == pytest.approx((1 - 0.3) / 0.2, abs=1e-4)


def test_one_hot_weight_adds_that_much_of_the_teachers_doubt(tiny_teacher, tiny_student):
    method = doubled(make(tiny_teacher, tiny_student, one_hot_weight=0.5))
    loss = method.generation(method.generator, Batch(latent=noise().latent.double()))
    doubt = -torch.log_softmax(loss.teacher.logits, 1).max(1).values.mean().item()
    assert loss.terms["one_hot"].item() == pytest.approx(doubt)
    total = loss.terms["adversarial"].item() + 0.5 * doubt
    assert loss.total.item() == pytest.approx(total)
    assert method.variant() == "one-hot"


def test_replayed_rows_are_not_called_fresh(tiny_teacher, tiny_student):
    steps = run(make(tiny_teacher, tiny_student, replay=0.5, student_steps=1))
    marks = [step.loss.fresh for step in steps if step.role == "student"]
    assert marks[0] is None, "nothing to replay yet"
    assert [mark.tolist() for mark in marks[1:]] == [[True] * 4 + [False] * 4] * 3
    plain = run(make(tiny_teacher, tiny_student, student_steps=1))
    assert all(step.loss.fresh is None for step in plain)


# What is suggested where nobody tuned


def suggestion(spec: InputSpec, classes: int, teacher: nn.Module | None = None) -> dict[str, Any]:
    teacher = teacher or build_model("convnet", spec, classes)
    student = build_model("convnet", spec, classes, widths=(4, 8))
    task = Classification(spec, classes)
    return dict(DFAD.suggest(task, [WhiteBoxTeacher(teacher)], student))


VIEWS = {"recolour": 0.5, "turn": 90.0, "generator_head": "sigmoid"}


def test_both_networks_see_fakes_through_the_same_views_in_both_stages(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, **VIEWS)
    seen: dict[str, list[Tensor]] = {"teacher": [], "student": [], "generator": []}
    for name, net in (("teacher", method.teacher), ("student", method.student)):
        net.register_forward_hook(
            lambda module, args, output, to=seen[name]: to.append(args[0].detach().clone())
        )
    method.generator.register_forward_hook(
        lambda module, args, output: seen["generator"].append(output.detach().clone())
    )
    run(method)
    assert len(seen["teacher"]) == 2 * 2 * 6
    for teacher, student, made in zip(*seen.values(), strict=True):
        assert torch.equal(teacher, student)
        # Recoloured, no image is as it was made.
        fakes = as_inputs(made, method.cfg, SPEC)
        assert ((teacher - fakes).flatten(1).abs().amax(1) > 0.01).all()


def test_a_generation_step_goes_through_views_that_its_batch_holds(tiny_teacher, tiny_student):
    method = doubled(make(tiny_teacher, tiny_student, **VIEWS))
    batch = Batch(latent=noise().latent.double(), extra=method.views(context()))
    first, second = (method.generation(method.generator, batch) for _ in range(2))
    assert torch.equal(first.total, second.total)
    plain = method.generation(method.generator, Batch(latent=batch.latent))
    assert plain.total != first.total
    torch.testing.assert_close(
        first.inputs, viewed(plain.inputs, batch.extra, SPEC), atol=1e-12, rtol=0
    )
    assert any(bool((g != 0).any()) for g in gradients(first.total, method.generator))


def test_the_memory_keeps_fakes_as_they_were_made(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, replay=0.5, **VIEWS)
    fresh, batch = method.fakes(context())
    method.memory.push(fresh)
    assert not torch.isclose(batch.inputs, fresh).all()
    fresh, batch = method.fakes(context())
    assert len(fresh) == 4
    assert len(batch) == 8
    assert batch.extra["fresh"].tolist() == [True] * 4 + [False] * 4


def test_views_are_off_by_default_and_named_where_they_are_on(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    assert method.views(context()) == {}
    assert method.variant() == ""
    assert make(tiny_teacher, tiny_student, **VIEWS).variant() == "recolouring, turning"


@pytest.mark.parametrize("classes", [2, 1000])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (33, 47), (64, 64), (96, 96), (224, 224)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_suggestion_fits_any_image_and_any_number_of_classes(channels, size, classes):
    spec = InputSpec.image(channels, *size)
    cfg = DFADConfig(**suggestion(spec, classes))
    teacher = build_model("convnet", spec, classes)
    method = DFAD(cfg, Classification(spec, classes), [WhiteBoxTeacher(teacher)], teacher, {})
    assert method.generator(torch.randn(2, cfg.latent_dim)).shape == (2, *spec.shape)
    assert cfg.bn_weight > 0
    assert cfg.units == "relative"


def test_a_suggestion_follows_what_the_teacher_offers():
    normalised = InputSpec.image(1, 32, 32, mean=[0.5], std=[0.5])
    with_statistics, without = (
        suggestion(normalised, 10, build_model(name, normalised, 10))
        for name in ("convnet", "lenet5")
    )
    assert with_statistics["bn_weight"] > 0
    assert "bn_weight" not in without
    # Pixels have a range, other numbers have none.
    assert with_statistics["generator_head"] == "sigmoid"
    maps = InputSpec("feature-maps", (1, 32, 32))
    assert suggestion(maps, 10)["generator_head"] == "tanh_bn"


def test_dear_networks_get_fewer_iterations_and_smaller_batches_within_limits():
    spec = InputSpec.image(3, 32, 32)
    cheap = suggestion(spec, 10, build_model("convnet", spec, 10))
    dear = suggestion(spec, 10, build_model("resnet18", spec, 10))
    assert cheap["rounds"] * cheap["iterations"] > 2 * dear["rounds"] * dear["iterations"]
    assert dear["batch_size"] <= cheap["batch_size"]
    assert dear["rounds"] * dear["iterations"] >= 80


def test_a_suggestion_draws_nothing_and_is_always_the_same():
    spec = InputSpec.image(1, 28, 28)
    teacher = build_model("convnet", spec, 10)
    before, random = state_of(teacher), torch.get_rng_state()
    first = DFAD.suggest(Classification(spec, 10), [WhiteBoxTeacher(teacher)], teacher)
    assert torch.equal(torch.get_rng_state(), random)
    assert same(before, state_of(teacher))
    assert first == DFAD.suggest(Classification(spec, 10), [WhiteBoxTeacher(teacher)], teacher)


def test_nothing_is_suggested_for_what_was_not_tried(tiny_teacher, tiny_student):
    assert DFAD.suggest(Dense(), [WhiteBoxTeacher(tiny_teacher)], tiny_student) == {}
