"""DeepInversion's invariants: what is minimised over the pixels, and which pixels are kept."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.types import Batch, InputSpec, Loss, Step
from vestige.errors import NoBatchNormError, RecipeError, ShapeError
from vestige.methods.deepinversion import DeepInversion, DeepInversionConfig, rise_and_fall
from vestige.sources.pool import Pool
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.context import RunContext

SPEC = InputSpec.image(1, 8, 8)
SMALL = {
    "rounds": 1,
    "inversion_steps": 3,
    "synthesis_batch_size": 8,
    "student_steps": 2,
    "batch_size": 8,
    "crop_padding": 1,
    "flip": False,
}
OFF = {"bn_weight": 0.0, "one_hot_weight": 0.0, "tv_weight": 0.0}


def make(
    teacher: nn.Module,
    student: nn.Module,
    spec: InputSpec = SPEC,
    sources: Any = None,
    **settings: Any,
) -> DeepInversion:
    cfg = DeepInversionConfig(**{**SMALL, **settings})
    task = Classification(spec, 3)
    return DeepInversion(cfg, task, [WhiteBoxTeacher(teacher)], student, sources or {})


def run(method: DeepInversion, seed: int = 0) -> list[Step]:
    ctx = RunContext(
        seed=seed,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=lambda: True,
    )
    return list(method.run(ctx))


def batch(rows: int = 8, shift: tuple[int, int, int] = (0, 0, 0), seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    pixels = nn.Parameter(torch.randn(rows, *SPEC.shape, generator=rng))
    labels = torch.randint(3, (rows,), generator=rng)
    return Batch(
        labels=labels,
        extra={"pixels": pixels, "shifts": torch.tensor([shift]).expand(rows, -1)},
    )


def loss_of(method: DeepInversion, given: Batch, *, adversarial_weight: float = 0.0) -> Loss:
    method.adversarial_weight = adversarial_weight
    return method.inversion(method.teacher, given)


class Shifted(nn.Module):
    """Another network's logits plus a constant for one class."""

    def __init__(self, network: nn.Module, shift: float) -> None:
        super().__init__()
        self.network, self.shift = network, shift

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs) + self.shift * F.one_hot(torch.tensor(0), 3)


class Bowl(nn.Module):
    """Cross entropy of class 0 that is a strictly monotone function of the mean pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, inputs: Tensor) -> Tensor:
        mean = inputs.flatten(1).mean(1)
        return torch.stack([mean, -mean, 0 * mean], 1) * self.norm.weight


def test_the_loss_is_the_papers_sum(tiny_teacher, tiny_student):
    weights = {
        "bn_weight": 0.7,
        "one_hot_weight": 0.3,
        "tv_weight": 0.2,
        "l2_weight": 0.05,
        "first_bn_weight": 3.0,
    }
    method = make(tiny_teacher, tiny_student, adversarial_weight=0.9, **weights)
    given = batch(shift=(2, -3, 1))
    found = loss_of(method, given, adversarial_weight=0.9)

    x = torch.roll(given.extra["pixels"].detach(), (2, -3), (2, 3)).flip(3)
    entered: list[Tensor] = []
    handle = tiny_teacher[1].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    t = tiny_teacher(x)
    handle.remove()
    (h,) = entered
    norm = tiny_teacher[1]
    statistics = (h.mean((0, 2, 3)) - norm.running_mean).norm()
    statistics += (h.var((0, 2, 3), unbiased=False) - norm.running_var).norm()
    variation = (x[..., 1:] - x[..., :-1]).norm() + (x[..., 1:, :] - x[..., :-1, :]).norm()
    variation += (x[..., 1:, 1:] - x[..., :-1, :-1]).norm()
    variation += (x[..., 1:, :-1] - x[..., :-1, 1:]).norm()
    p, q = ((logits / 3).softmax(1) for logits in (tiny_student.eval()(x), t))
    m = ((p + q) / 2).clamp(0.01, 0.99)
    j = sum((m * (m.log() - side.clamp(0.01, 0.99).log())).sum(1).mean() / 2 for side in (p, q))
    terms = {
        "one_hot": F.cross_entropy(t, given.labels),
        # Its only layer is its first one.
        "bn_statistics": 3 * statistics,
        "total_variation": variation,
        "norm": x.flatten(1).norm(dim=1).mean(),
        "adversarial": 1 - j,
    }
    assert set(found.terms) == set(terms)
    for name, value in terms.items():
        # Two float32 routes to one number.
        assert found.terms[name].item() == pytest.approx(value.item(), rel=1e-4), name
    total = 0.3 * terms["one_hot"] + 0.7 * terms["bn_statistics"] + 0.2 * variation
    total = total + 0.05 * terms["norm"] + 0.9 * terms["adversarial"]
    assert found.total.item() == pytest.approx(total.item(), rel=1e-4)
    assert torch.equal(found.inputs, given.extra["pixels"])


def test_at_the_stored_statistics_their_term_is_zero(tiny_student):
    # One BatchNorm on the images themselves, whose statistics are those of the batch.
    teacher = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 3)).eval()
    given = batch(shift=(1, 1, 1))
    pixels = given.extra["pixels"].detach()
    teacher[0].running_mean, teacher[0].running_var = (
        pixels.mean((0, 2, 3)),
        pixels.var((0, 2, 3), unbiased=False),
    )
    method = make(teacher, tiny_student)
    # Rolling and mirroring moves no statistics; float32 rounding of 512 values.
    assert loss_of(method, given).terms["bn_statistics"].item() == pytest.approx(0, abs=1e-6)
    brighter = Batch(labels=given.labels, extra={**given.extra, "pixels": pixels + 0.25})
    found = loss_of(method, brighter).terms["bn_statistics"].item()
    assert found == pytest.approx(0.25, rel=1e-5)


def test_a_student_that_answers_as_the_teacher_costs_most(tiny_teacher):
    method = make(tiny_teacher, tiny_teacher, **OFF, adversarial_weight=1.0)
    given = batch()
    same = loss_of(method, given, adversarial_weight=1.0)
    assert same.terms["adversarial"].item() == pytest.approx(1, abs=1e-6)
    method.student = Shifted(tiny_teacher, 2.0)
    some = loss_of(method, given, adversarial_weight=1.0).terms["adversarial"].item()
    method.student = Shifted(tiny_teacher, 4.0)
    more = loss_of(method, given, adversarial_weight=1.0).terms["adversarial"].item()
    assert 1 > some > more > 0


def test_the_student_is_asked_in_eval_mode_and_only_by_adi(tiny_teacher, tiny_student):
    modes: list[bool] = []
    tiny_student.register_forward_hook(lambda module, *_: modes.append(module.training))
    before = {k: v.clone() for k, v in tiny_student.state_dict().items()}
    method = make(tiny_teacher, tiny_student, adversarial_weight=1.0)
    tiny_student.train()
    loss_of(method, batch())
    assert modes == []
    loss_of(method, batch(), adversarial_weight=1.0)
    assert modes == [False]
    assert tiny_student.training
    assert all(torch.equal(before[k], v) for k, v in tiny_student.state_dict().items())


def test_the_warm_up_is_not_adaptive(tiny_teacher, tiny_student):
    steps = run(make(tiny_teacher, tiny_student, warmup=1, adversarial_weight=1.0))
    sources = ["adversarial" in step.loss.terms for step in steps if step.role == "source"]
    assert sources == [False] * 3 + [True] * 3


def test_the_gradient_reaches_the_pixels_through_both_networks(tiny_teacher, tiny_student):
    given = batch(shift=(1, 0, 1))
    pixels = given.extra["pixels"]
    method = make(tiny_teacher, tiny_student, adversarial_weight=1.0, **OFF)
    through = {}
    for name, student in {"both": tiny_student, "detached": Detached(tiny_student)}.items():
        method.student = student
        total = loss_of(method, given, adversarial_weight=1.0).total
        (through[name],) = torch.autograd.grad(total, pixels)
    assert through["both"].abs().amax((1, 2, 3)).min() > 0
    assert not torch.allclose(through["both"], through["detached"])


class Detached(nn.Module):
    """Another network's logits without gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs).detach()


def test_the_batch_of_the_lowest_loss_is_kept_and_not_the_last(tiny_student):
    # So large a rate jumps back and forth over the optimum, and ends where it is not.
    method = make(
        Bowl().eval(),
        tiny_student,
        rounds=0,
        warmup=1,
        inversion_steps=12,
        inversion_lr=0.9,
        inversion_betas=(0.0, 0.9),
        l2_weight=1.0,
        **{**OFF, "one_hot_weight": 1.0},
        clip=False,
    )
    method.pool = Pool(None)
    losses = [step.loss for step in run(method)]
    totals = torch.stack([loss.total for loss in losses])
    best = int(totals.argmin())
    assert best not in (0, 11)
    kept = method.pool.between(0, 8)
    assert torch.equal(kept, losses[best].inputs)
    assert not torch.equal(kept, losses[-1].inputs)
    assert method.pool.losses == [pytest.approx(totals[best].item())]
    # The kept batch has that loss: it is the one before the step, not after it.
    again = Batch(
        labels=method.pool.labels,
        extra={"pixels": kept, "shifts": torch.zeros(8, 3, dtype=torch.int64)},
    )
    # Neither the mean nor the norm changes by rolling.
    again_total = method.inversion(method.teacher, again).total.item()
    assert again_total == pytest.approx(totals[best].item(), rel=1e-5)


def test_each_term_moves_the_images_to_what_it_asks_for(tiny_teacher, tiny_student):
    def ends(**settings: float) -> tuple[Loss, Loss]:
        method = make(
            tiny_teacher,
            tiny_student,
            rounds=0,
            warmup=1,
            inversion_steps=60,
            synthesis_batch_size=32,
            inversion_lr=0.3,
            clip=False,
            **{"bn_weight": 0.1, **settings},
        )
        steps = run(method)
        return steps[0].loss, steps[-1].loss

    start, both = ends()
    _, no_class = ends(one_hot_weight=0.0)
    _, no_statistics = ends(bn_weight=1e-9)
    # Measured 0.88 and 0.72; the logits of a network that nobody trained move little.
    assert both.terms["one_hot"] < 0.93 * start.terms["one_hot"]
    assert both.terms["bn_statistics"] < 0.8 * start.terms["bn_statistics"]
    assert no_class.terms["one_hot"] > 1.05 * both.terms["one_hot"]
    assert no_statistics.terms["bn_statistics"] > 1.05 * both.terms["bn_statistics"]


def test_pixels_stay_images_where_they_are_clipped(tiny_teacher, tiny_student):
    spec = InputSpec.image(1, 8, 8, mean=(0.4,), std=(0.2,))

    def ends(clip: bool) -> tuple[float, float]:
        method = make(
            tiny_teacher, tiny_student, spec, rounds=0, warmup=1, clip=clip, inversion_lr=2.0
        )
        inputs = run(method)[-1].loss.inputs * 0.2 + 0.4
        return inputs.min().item(), inputs.max().item()

    low, high = ends(True)
    # Rounding of the way to the normalised space and back.
    assert low == pytest.approx(0, abs=1e-6)
    assert high == pytest.approx(1, abs=1e-6)
    low, high = ends(False)
    assert low < -0.1
    assert high > 1.1


def test_the_batch_is_rolled_as_a_whole(tiny_teacher, tiny_student):
    seen: list[Tensor] = []
    teacher = nn.Sequential(nn.Identity(), *tiny_teacher)
    teacher[0].register_forward_hook(lambda _, args, output: seen.append(args[0].detach()))
    method = make(teacher, tiny_student, rounds=0, warmup=1, inversion_steps=30, roll=2, flip=True)
    moves = set()
    for step, view in zip(run(method), seen, strict=True):
        inputs = step.loss.inputs
        fitting = [
            (down, right, flip)
            for down in range(-3, 4)
            for right in range(-3, 4)
            for flip in (False, True)
            if torch.equal(view, flipped(inputs.roll((down, right), (2, 3)), flip))
        ]
        assert len(fitting) == 1
        moves.add(fitting[0])
    # 50 are possible; 30 draws give 23 different ones on average.
    assert len(moves) > 15
    assert {abs(down) for down, _, _ in moves} == {abs(right) for _, right, _ in moves} == {0, 1, 2}
    assert {flip for _, _, flip in moves} == {False, True}


def flipped(images: Tensor, flip: bool) -> Tensor:
    return images.flip(3) if flip else images


def test_half_the_size_comes_first(tiny_teacher, tiny_student):
    seen: list[Tensor] = []
    teacher = nn.Sequential(nn.Identity(), *tiny_teacher)
    teacher[0].register_forward_hook(lambda _, args, output: seen.append(args[0].detach()))
    method = make(
        teacher,
        tiny_student,
        rounds=0,
        warmup=1,
        low_resolution_steps=4,
        inversion_steps=2,
        roll=0,
        adversarial_weight=1.0,
        clip=False,
    )
    seen.clear()  # the constructor asks whether half the size is taken
    losses = [step.loss for step in run(method)]
    assert [view.shape[2] for view in seen] == [4, 4, 4, 4, 8, 8]
    for loss, view in zip(losses, seen, strict=True):
        assert loss.inputs.shape[2:] == (8, 8)
        expected = F.avg_pool2d(loss.inputs, 2) if view.shape[2] == 4 else loss.inputs
        torch.testing.assert_close(view, expected)
    # The pixels go on from one size to the other, and the pool has what was best at full size.
    moved = (losses[4].inputs - losses[3].inputs).abs().max().item()
    # At the rate of 0.05, up to how Adam begins.
    assert 0.04 < moved < 0.051
    late = torch.stack([loss.total for loss in losses[4:]])
    assert method.pool.losses == [pytest.approx(late.min().item())]


def test_at_half_the_size_the_pixels_of_a_square_move_together(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, low_resolution_steps=1)
    method.half_size = True
    given = batch()
    (grad,) = torch.autograd.grad(loss_of(method, given).total, given.extra["pixels"])
    squares = F.avg_pool2d(grad, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(grad, squares)
    assert grad.abs().max() > 0


@pytest.mark.parametrize("adversarial_weight", [0.0, 1.0])
def test_networks_of_one_size_are_refused_half_of_it(
    tiny_teacher, tiny_student, adversarial_weight
):
    def rigid() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    with pytest.raises(ShapeError, match="set low_resolution_steps: 0"):
        make(rigid(), tiny_student, low_resolution_steps=1, bn_weight=0)
    make(rigid(), tiny_student, bn_weight=0)
    settings = {"low_resolution_steps": 1, "adversarial_weight": adversarial_weight}
    if adversarial_weight:
        with pytest.raises(ShapeError, match="takes 8x8 only"):
            make(tiny_teacher, rigid(), **settings)
    else:
        # Only the teacher sees them.
        run(make(tiny_teacher, rigid(), **settings))


def test_the_rate_rises_for_a_twentieth_and_falls_along_a_cosine():
    # The reference code: 100 of 2000 steps.
    for done in (0, 49, 99, 100, 1050, 1999):
        published = (
            (done + 1) / 100
            if done < 100
            else 0.5 * (1 + math.cos(math.pi * (done - 100) / (2000 - 100)))
        )
        assert rise_and_fall(done, 2000) == pytest.approx(published, rel=1e-12)
    assert rise_and_fall(0, 1) == 1
    assert all(0 < rise_and_fall(done, 60) <= 1 for done in range(60))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_first_step_of_adam_is_the_rate(tiny_teacher, tiny_student, schedule):
    method = make(
        tiny_teacher,
        tiny_student,
        rounds=0,
        warmup=1,
        inversion_steps=40,
        inversion_lr=0.01,
        inversion_schedule=schedule,
        clip=False,
    )
    first, second = (step.loss.inputs for step in run(method)[:2])
    # Adam's first step is the rate in the direction of the sign.
    moved = (second - first).abs().median().item()
    assert moved == pytest.approx(0.01 * (0.5 if schedule == "cosine" else 1), rel=1e-2)


def test_without_batchnorm_the_classes_alone_are_asked_for(tiny_student):
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    with pytest.raises(NoBatchNormError, match="bn_weight: 0"):
        make(teacher, tiny_student)
    method = make(teacher, tiny_student, bn_weight=0)
    steps = run(method)
    assert all("bn_statistics" not in step.loss.terms for step in steps)
    assert len(method.pool) == 8


def test_no_round_leaves_the_pool_as_the_result(tiny_teacher, tiny_student):
    before = {k: v.clone() for k, v in tiny_student.state_dict().items()}
    method = make(tiny_teacher, tiny_student, rounds=0, warmup=2)
    assert {step.role for step in run(method)} == {"source"}
    assert method.result().kind == "pool"
    assert method.result().object is method.pool
    assert len(method.pool) == 16
    assert all(torch.equal(before[k], v) for k, v in tiny_student.state_dict().items())
    with pytest.raises(RecipeError, match="rounds 0 and warmup 0"):
        make(tiny_teacher, tiny_student, rounds=0)


def test_an_earlier_pool_is_drawn_from_and_not_changed(tiny_teacher, tiny_student):
    earlier = Pool(SPEC)
    earlier.add(torch.ones(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64))
    method = make(
        tiny_teacher,
        tiny_student,
        sources={"pool": earlier},
        batches_per_round=0,
        crop_padding=0,
    )
    steps = run(method)
    assert [step.role for step in steps] == ["student"] * 2
    assert all(torch.equal(step.loss.inputs, torch.ones(8, 1, 8, 8)) for step in steps)
    assert len(earlier) == 8


@pytest.mark.parametrize(("channels", "side"), [(4, 8), (3, 33), (1, 224)])
def test_images_of_any_size_and_many_classes(channels, side):
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3, 4),
            nn.BatchNorm2d(4),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 1000),
        )

    cfg = DeepInversionConfig(
        **{**SMALL, "synthesis_batch_size": 4, "roll": side // 8, "flip": True},
        low_resolution_steps=2,
        adversarial_weight=0.2,
    )
    task = Classification(InputSpec.image(channels, side, side), 1000)
    student = network()
    method = DeepInversion(cfg, task, [WhiteBoxTeacher(network())], student, {})
    steps = run(method)
    assert all(math.isfinite(step.loss.total) for step in steps)
    assert method.pool.between(0, 4).shape == (4, channels, side, side)
    assert method.pool.labels.max() > 3


@pytest.mark.parametrize(
    "settings", [{"inversion_betas": (0.9, 1.0)}, {"inversion_lr": 0}, {"tv_form": "l3"}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        DeepInversionConfig(**settings)


def test_the_variant_tells_what_is_on(tiny_teacher, tiny_student):
    assert make(tiny_teacher, tiny_student).variant() == ""
    method = make(tiny_teacher, tiny_student, adversarial_weight=1, low_resolution_steps=1)
    assert method.variant() == "adaptive, two resolutions"
