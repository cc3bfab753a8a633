"""ZSKT's invariants, from the paper and its reference code."""

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core import schedules
from vestige.core.types import Batch, InputSpec, Step
from vestige.errors import RecipeError, ShapeError, TeacherError
from vestige.methods.zskt import ZSKT, ZSKTConfig
from vestige.models.factory import build_model
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.context import RunContext

SPEC = InputSpec.image(1, 8, 8)
SMALL = {
    "rounds": 2,
    "iterations": 2,
    "student_steps": 3,
    "batch_size": 8,
    "generator_width": 4,
    "latent_dim": 8,
    "schedule": "constant",
}


class Recorder(RunContext):
    """Remembers what updates were clipped to."""

    def __init__(self) -> None:
        super().__init__(
            seed=0,
            device=torch.device("cpu"),
            plugins={},
            reduce=lambda params: None,
            on_loop=lambda name, n: 0,
            on_round=lambda: True,
        )
        self.clips: Counter[tuple[str, float | None]] = Counter()

    def update(self, role: Any, *args: Any, **given: Any) -> Step:
        self.clips[role, given.get("clip")] += 1
        return super().update(role, *args, **given)


def make(teacher: nn.Module, student: nn.Module, seed: int = 0, **settings: Any) -> ZSKT:
    torch.manual_seed(seed)  # decides the generator's weights
    cfg = ZSKTConfig(**{**SMALL, **settings})
    return ZSKT(cfg, Classification(SPEC, 3), [WhiteBoxTeacher(teacher)], student, {})


def run(method: ZSKT) -> list[Step]:
    return list(method.run(Recorder()))


def noise(rows: int = 8) -> Batch:
    return Batch(latent=torch.randn(rows, 8, generator=torch.Generator().manual_seed(5)))


def images(rows: int = 8) -> Tensor:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(6))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def slow_map(features: Tensor) -> list[list[float]]:
    """Each row's channel mean of squares by loops, divided by its length."""
    maps = []
    for row in features.tolist():
        height, width = len(row[0]), len(row[0][0])
        flat = [
            sum(channel[y][x] ** 2 for channel in row) / len(row)
            for y in range(height)
            for x in range(width)
        ]
        length = math.sqrt(sum(value**2 for value in flat))
        maps.append([value / length for value in flat])
    return maps


# What the paper says


def test_a_student_that_equals_the_teacher_leaves_nothing_to_do(tiny_teacher):
    student = copy.deepcopy(tiny_teacher).requires_grad_(True)
    method = make(tiny_teacher, student)
    loss = method.generation(method.generator, noise())
    assert loss.total.item() == 0
    # The gradients of softmax at equal logits cancel up to rounding.
    for grad in torch.autograd.grad(loss.total, list(method.generator.parameters())):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-7)
    imitated = method.imitation(student, Batch(loss.inputs.detach()))
    assert imitated.total.item() == 0
    assert imitated.terms["attention"].item() == 0
    for grad in torch.autograd.grad(imitated.total, list(student.parameters())):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


def test_the_divergence_is_the_mean_over_batch_and_classes(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student.eval())
    loss = method.generation(method.generator, noise())
    inputs = loss.inputs.detach()
    p, q = (F.softmax(net(inputs).detach(), 1) for net in (tiny_teacher, tiny_student))
    slow = sum(
        float(p[row, k] * (p[row, k] / q[row, k]).log()) for row in range(8) for k in range(3)
    )
    # 24 float32 terms; the usual KL divides by 8, not by 24.
    assert loss.total.item() == pytest.approx(-slow / 24, rel=1e-4)
    imitated = method.imitation(tiny_student, Batch(inputs))
    assert imitated.terms["distillation"].item() == pytest.approx(slow / 24, rel=1e-4)


def test_attention_compares_normalised_maps_of_the_named_layers(tiny_teacher, tiny_student):
    layers = ("0", "3")
    method = make(
        tiny_teacher,
        tiny_student.eval(),
        attention_weight=30.0,
        teacher_layers=layers,
        student_layers=layers,
    )
    inputs = images()
    loss = method.imitation(tiny_student, Batch(inputs))
    slow = 0.0
    for last in (0, 3):
        ours, theirs = (slow_map(net[: last + 1](inputs)) for net in (tiny_student, tiny_teacher))
        count = len(ours) * len(ours[0])
        slow += (
            sum(
                (a - b) ** 2
                for s, t in zip(ours, theirs, strict=True)
                for a, b in zip(s, t, strict=True)
            )
            / count
        )
    assert slow > 1e-4
    assert loss.terms["attention"].item() == pytest.approx(slow, rel=1e-4)
    assert loss.total.item() == pytest.approx(
        loss.terms["distillation"].item() + 30 * slow, rel=1e-4
    )


def test_layers_that_are_not_named_are_the_last_of_each_resolution_of_both(
    tiny_teacher, tiny_student
):
    method = make(tiny_teacher, tiny_student)
    assert method.probes is not None
    # 8x8 up to the ReLU, 2x2 after the pooling.
    assert method.probes[0].names == ("module.2", "module.3")
    assert method.probes[1].names == ("2", "3")


def test_the_loop_is_the_reference_codes(tiny_teacher, tiny_student):
    other = copy.deepcopy(tiny_student)
    method = make(tiny_teacher, tiny_student, teacher_layers=("2",), student_layers=("2",))
    generator = copy.deepcopy(method.generator)
    drawn: list[Tensor] = []
    method.generator.register_forward_hook(lambda module, args, out: drawn.append(args[0].clone()))
    run(method)
    assert len(drawn) == 8
    assert all(torch.equal(*drawn[start : start + 2]) for start in range(0, 8, 2))

    # As published: images made anew of one z for each step, and attached to G throughout.
    generator.train()
    moves_generator = torch.optim.Adam(generator.parameters(), 1e-3)
    moves_student = torch.optim.Adam(other.parameters(), 2e-3)

    def divergence(made: Tensor) -> Tensor:
        answers = F.log_softmax(other(made), 1), F.softmax(tiny_teacher(made), 1)
        return F.kl_div(*answers, reduction="none").mean()

    def attention(net: nn.Module, made: Tensor) -> Tensor:
        return F.normalize(net[:3](made).pow(2).mean(1).flatten(1))

    for latent in drawn[::2]:
        moves_generator.zero_grad()
        (-divergence(generator(latent))).backward()
        nn.utils.clip_grad_norm_(generator.parameters(), 5)
        moves_generator.step()
        for _ in range(3):
            made = generator(latent)
            difference = attention(other, made) - attention(tiny_teacher, made)
            moves_student.zero_grad()
            (divergence(made) + 250 * difference.pow(2).mean()).backward()
            nn.utils.clip_grad_norm_(other.parameters(), 5)
            moves_student.step()

    # Rounding, which Adam's first steps, of nearly the sign alone, enlarge where a gradient is
    # almost 0; a student on other images, or one step more, is 2e-3 away.
    assert (tiny_student[5].weight - other[5].weight).abs().max() < 1e-4
    assert (tiny_student[0].weight - other[0].weight).abs().max() < 1e-4
    ours, theirs = method.generator.head[0].weight, generator.head[0].weight
    assert (ours - theirs).abs().max() < 1e-4


def test_all_student_steps_take_one_batch_unless_z_is_fresh(tiny_teacher, tiny_student):
    seen: dict[str, list[Step]] = {}
    counts: dict[str, Counter[str]] = {}
    for policy in ("same", "fresh"):
        method = make(tiny_teacher, copy.deepcopy(tiny_student), z_policy=policy)
        count = counts[policy] = Counter()
        for name, net in (("generator", method.generator), ("teacher", method.teacher)):
            net.register_forward_hook(lambda *_, name=name, count=count: count.update([name]))
        seen[policy] = run(method)
        roles = [step.role for step in seen[policy]]
        assert roles == (["source"] + ["student"] * 3) * 4
    assert counts["same"] == {"generator": 8, "teacher": 8}
    assert counts["fresh"] == {"generator": 16, "teacher": 16}

    for start in range(0, 16, 4):
        before, first, *rest = (step.loss for step in seen["same"][start : start + 4])
        # The generator has moved since its own step.
        assert not torch.equal(before.inputs, first.inputs)
        assert (before.inputs - first.inputs).abs().max() < 0.5
        assert first.fresh.all()
        for loss in rest:
            assert torch.equal(loss.inputs, first.inputs)
            assert torch.equal(loss.teacher.logits, first.teacher.logits)
            assert not loss.fresh.any()
    batches = [step.loss.inputs for step in seen["fresh"]]
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 16
    assert all(step.loss.fresh is None for step in seen["fresh"])


def test_each_step_changes_its_own_network_alone(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    nets = {"teacher": tiny_teacher, "student": tiny_student, "generator": method.generator}
    before = {name: weights(net) for name, net in nets.items()}
    for step in method.run(Recorder()):
        after = {name: weights(net) for name, net in nets.items()}
        moved = {name for name in nets if not same(before[name], after[name])}
        assert moved == {"student" if step.role == "student" else "generator"}
        before = after


def test_every_gradient_is_clipped(tiny_teacher, tiny_student):
    ctx = Recorder()
    list(make(tiny_teacher, tiny_student).run(ctx))
    assert ctx.clips == {("source", 5.0): 4, ("student", 5.0): 12}

    tight = make(
        tiny_teacher, tiny_student, clip=1e-3, student_optimizer="sgd", student_lr=1.0, iterations=1
    )
    steps = tight.run(Recorder())
    next(steps)
    before = weights(tiny_student)
    next(steps)
    moved = [(after - before[name]).norm() for name, after in tiny_student.named_parameters()]
    # A step of SGD with rate 1 is as long as its gradient.
    assert torch.stack(moved).norm().item() == pytest.approx(1e-3, rel=1e-3)


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


def test_the_defaults_are_the_reference_codes_for_cifar(tiny_teacher, tiny_student):
    cfg = ZSKTConfig()
    assert (cfg.batch_size, cfg.latent_dim, cfg.student_steps) == (128, 100, 10)
    assert cfg.rounds * cfg.iterations == 80_000
    assert (cfg.attention_weight, cfg.clip, cfg.z_policy) == (250, 5, "same")
    assert (cfg.student_optimizer, cfg.student_lr, cfg.generator_lr) == ("adam", 2e-3, 1e-3)
    assert cfg.student_weight_decay == 0
    schedule = schedules.named(cfg.schedule, cfg.milestones)
    assert schedule is not None
    rates = [schedule.factor(done / 800) for done in (0, 200, 400, 800)]
    assert rates == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0])
    assert make(tiny_teacher, tiny_student, z_policy=cfg.z_policy).variant() == ""
    # Nothing bounds the images; their BatchNorm has weights of its own.
    head = make(tiny_teacher, tiny_student).generator.head
    assert [type(layer) for layer in head] == [nn.Conv2d, nn.BatchNorm2d]
    assert head[1].affine


# Options


def test_a_batch_of_inputs_alone_is_asked_about(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student.eval())
    batch = next(method.batches(noise(), Recorder()))
    assert set(batch.extra) == {"teacher", "map0", "map1", "fresh"}
    losses = [method.imitation(tiny_student, one) for one in (batch, Batch(batch.inputs))]
    assert torch.equal(losses[0].total, losses[1].total)
    assert torch.equal(losses[0].terms["attention"], losses[1].terms["attention"])
    assert losses[0].terms["attention"] > 0


def test_without_attention_there_is_one_term_and_nothing_is_looked_into(tiny_student):
    # No maps at all, and another form than the teacher's.
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    method = make(flat, tiny_student, attention_weight=0)
    losses = [step.loss for step in run(method)]
    assert {name for loss in losses for name in loss.terms} == {"adversarial", "distillation"}
    assert all(loss.total == next(iter(loss.terms.values())) for loss in losses)
    assert method.probes is None
    assert method.variant() == "no attention transfer"
    with pytest.raises(TeacherError, match=r"attention_weight: 0"):
        make(flat, tiny_student)


def test_attention_pulls_the_students_maps_to_the_teachers(tiny_teacher, tiny_student):
    def distance(weight: float) -> float:
        student = copy.deepcopy(tiny_student)
        run(make(tiny_teacher, student, iterations=20, student_steps=5, attention_weight=weight))
        measured = make(tiny_teacher, student.eval())
        return measured.imitation(student, Batch(images(64))).terms["attention"].item()

    # Well apart: three channels cannot do all that eight do, but a third less was seen.
    assert distance(250.0) < 0.8 * distance(0.0)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"teacher_layers": ("0",)}, RecipeError, "1 teacher_layers and 0 student_layers"),
        ({"teacher_layers": ("0",), "student_layers": ("9",)}, TeacherError, r"\['9'\]"),
        ({"teacher_layers": ("nine",), "student_layers": ("0",)}, TeacherError, r"\['nine'\]"),
    ],
)
def test_layers_that_do_not_pair_are_refused_at_build(
    tiny_teacher, tiny_student, given, error, said
):
    with pytest.raises(error, match=said):
        make(tiny_teacher, tiny_student, **given)


def test_maps_of_different_resolution_are_refused_in_the_first_step(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, teacher_layers=("2",), student_layers=("3",))
    with pytest.raises(ShapeError, match="expected the same batch, height and width"):
        run(method)


def test_networks_of_other_widths_and_depths_pair_by_resolution():
    spec = InputSpec.image(3, 16, 16)
    teacher, student = (build_model(name, spec, 3) for name in ("wrn-16-2", "resnet18"))
    task = Classification(spec, 3)
    cfg = ZSKTConfig(**{**SMALL, "batch_size": 2})
    method = ZSKT(cfg, task, [WhiteBoxTeacher(teacher)], student, {})
    assert method.probes is not None
    # 16, 8 and 4 pixels; ResNet-18's 2 pixels have no partner.
    assert len(method.probes[0].names) == len(method.probes[1].names) == 3
    loss = method.imitation(student, Batch(torch.randn(2, 3, 16, 16)))
    assert math.isfinite(loss.terms["attention"].item())
