"""DAFL's invariants, from the paper and its reference code."""

import copy
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core import schedules
from vestige.core.types import Batch, InputSpec
from vestige.errors import TeacherError
from vestige.methods.dafl import DAFL, DAFLConfig
from vestige.models.factory import build_model
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


def make(
    teacher: nn.Module, student: nn.Module, seed: int = 0, spec: InputSpec = SPEC, **settings: Any
) -> DAFL:
    torch.manual_seed(seed)  # decides the generator's weights
    cfg = DAFLConfig(**{**SMALL, **settings})
    return DAFL(cfg, Classification(spec, 3), [WhiteBoxTeacher(teacher)], student, {})


def context() -> RunContext:
    return RunContext(
        seed=0,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=lambda: True,
    )


def noise(rows: int = 8) -> Batch:
    return Batch(latent=torch.randn(rows, 8, generator=torch.Generator().manual_seed(5)))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# What the paper says


@pytest.mark.parametrize("base", ["10", "e"])
def test_the_generators_loss_is_the_papers(tiny_teacher, tiny_student, base):
    method = make(
        tiny_teacher,
        tiny_student,
        one_hot_weight=0.3,
        balance_weight=7.0,
        activation_weight=0.2,
        log_base=base,
    )
    for module in (method.teacher, method.generator):
        module.double()
    loss = method.generation(method.generator, Batch(latent=noise().latent.double()))

    inputs = loss.inputs.detach()
    logits = tiny_teacher(inputs).numpy()
    entering = tiny_teacher[:5](inputs).numpy()
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    log = np.log10 if base == "10" else np.log
    one_hot = -np.mean([math.log(row.max()) for row in probs])
    balance = sum(float(p * log(p)) for p in probs.mean(0))
    activation = -np.mean(np.abs(entering))
    slow = 0.3 * one_hot + 7.0 * balance + 0.2 * activation
    # Rounding of float64 is the only error.
    assert loss.total.item() == pytest.approx(slow, rel=1e-10)
    assert loss.terms["activation"].item() == pytest.approx(activation, rel=1e-10)
    assert activation < -0.1


@pytest.mark.parametrize(("base", "least"), [("10", -math.log10(3)), ("e", -math.log(3))])
def test_a_teacher_that_is_sure_of_nothing_is_balanced_and_not_one_hot(
    tiny_teacher, tiny_student, base, least
):
    nn.init.zeros_(tiny_teacher[5].weight)
    nn.init.zeros_(tiny_teacher[5].bias)
    method = make(tiny_teacher, tiny_student, log_base=base)
    terms = method.generation(method.generator, noise()).terms
    assert terms["one_hot"].item() == pytest.approx(math.log(3), abs=1e-6)
    assert terms["class_balance"].item() == pytest.approx(least, abs=1e-6)


def test_a_teacher_that_is_sure_of_one_class_is_one_hot_and_not_balanced(
    tiny_teacher, tiny_student
):
    nn.init.zeros_(tiny_teacher[5].weight)
    tiny_teacher[5].bias.copy_(torch.tensor([0.0, 100.0, 0.0]))
    method = make(tiny_teacher, tiny_student)
    terms = method.generation(method.generator, noise()).terms
    assert terms["one_hot"].item() == pytest.approx(0, abs=1e-6)
    assert terms["class_balance"].item() == pytest.approx(0, abs=1e-6)


def test_the_students_loss_is_the_divergence_at_temperature_1(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    inputs = torch.randn(8, 1, 8, 8)
    loss = method.imitation(tiny_student.eval(), Batch(inputs))
    p, q = (F.softmax(net(inputs).detach(), 1) for net in (tiny_teacher, tiny_student))
    slow = sum(
        float(p[row, k] * (p[row, k] / q[row, k]).log()) for row in range(8) for k in range(3)
    )
    # The sum over classes, divided by the batch; 24 float32 terms.
    assert loss.total.item() == pytest.approx(slow / 8, rel=1e-4)


def test_two_updates_are_the_reference_codes_joint_one(tiny_teacher, tiny_student):
    other = copy.deepcopy(tiny_student)
    settings = {"one_hot_weight": 1.0, "balance_weight": 5.0, "activation_weight": 0.1}
    method = make(tiny_teacher, tiny_student, **settings)
    generator = copy.deepcopy(method.generator)
    drawn: list[Tensor] = []
    method.generator.register_forward_hook(lambda module, args, out: drawn.append(args[0].clone()))
    list(method.run(context()))

    # As published: one backward of the sum, then a step of each.
    generator.train()
    other.train()
    moves_generator = torch.optim.Adam(generator.parameters(), 0.02)
    moves_student = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for latent in drawn:
        made = generator(latent)
        features = tiny_teacher[:5](made)
        logits = tiny_teacher[5](features)
        mean = F.softmax(logits, 1).mean(0)
        judged = F.cross_entropy(logits, logits.argmax(1)) - 0.1 * features.abs().mean()
        judged = judged + 5.0 * (mean * mean.log10()).sum()
        followed = F.kl_div(
            F.log_softmax(other(made.detach()), 1), F.softmax(logits.detach(), 1), reduction="sum"
        ) / len(made)
        moves_generator.zero_grad()
        moves_student.zero_grad()
        (judged + followed).backward()
        moves_generator.step()
        moves_student.step()

    assert len(drawn) == 4
    # Four steps of rounding, which Adam's first steps, of nearly the sign alone, enlarge.
    for name, weight in other.named_parameters():
        ours = dict(tiny_student.named_parameters())[name]
        torch.testing.assert_close(ours, weight, rtol=1e-3, atol=1e-3)
    moved = weights(make(tiny_teacher, tiny_student, **settings).generator)
    for name in ("head.0.weight", "blocks.1.weight"):
        ours = dict(method.generator.named_parameters())[name]
        torch.testing.assert_close(ours, generator.get_parameter(name), rtol=1e-3, atol=1e-3)
        assert (ours - moved[name]).abs().max() > 0.02


def test_the_student_learns_from_the_generators_own_batch_and_answers(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    made: list[Tensor] = []
    method.generator.register_forward_hook(lambda module, args, out: made.append(out.detach()))
    asked: Counter[str] = Counter()
    method.teacher.register_forward_hook(lambda *_: asked.update(["teacher"]))
    steps = list(method.run(context()))
    assert [step.role for step in steps] == ["source", "student"] * 4
    assert len(made) == asked["teacher"] == 4
    for source, student, images in zip(steps[::2], steps[1::2], made, strict=True):
        assert torch.equal(student.loss.inputs, images)
        assert torch.equal(student.loss.teacher.logits, source.loss.teacher.logits)


def test_each_step_changes_its_own_network_alone(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    nets = {"teacher": tiny_teacher, "student": tiny_student, "generator": method.generator}
    before = {name: weights(net) for name, net in nets.items()}
    for step in method.run(context()):
        after = {name: weights(net) for name, net in nets.items()}
        moved = {name for name in nets if not same(before[name], after[name])}
        assert moved == {"student" if step.role == "student" else "generator"}
        before = after


def test_a_batch_of_inputs_alone_is_asked_about(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    inputs = torch.randn(8, 1, 8, 8)
    known = Batch(inputs, extra={"teacher": tiny_teacher(inputs)})
    losses = [method.imitation(tiny_student.eval(), one) for one in (known, Batch(inputs))]
    assert torch.equal(losses[0].total, losses[1].total)
    assert method.teacher.queries == 8


def test_the_generator_gets_what_the_teacher_likes(tiny_teacher, tiny_student):
    tiny_teacher[5].weight.mul_(4)  # so that it can be sure at all

    def ends(name: str, weight: float) -> tuple[float, float]:
        method = make(
            tiny_teacher,
            copy.deepcopy(tiny_student),
            iterations=40,
            one_hot_weight=3.0,
            balance_weight=weight,
            batch_size=32,
        )
        steps = [step for step in method.run(context()) if step.role == "source"]
        values = [step.loss.terms[name].item() for step in steps]
        return float(np.mean(values[:3])), float(np.mean(values[-10:]))

    first, last = ends("one_hot", 5.0)
    assert last < 0.75 * first
    # Without the balance it is sure of fewer classes; -log10 3 is the even batch.
    assert ends("class_balance", 5.0)[1] < -0.75 * math.log10(3) < ends("class_balance", 0.0)[1]


def test_the_defaults_are_the_reference_codes_for_cifar():
    cfg = DAFLConfig()
    assert (cfg.rounds, cfg.iterations, cfg.batch_size, cfg.latent_dim) == (2000, 120, 1024, 1000)
    assert (cfg.one_hot_weight, cfg.balance_weight, cfg.activation_weight) == (0.05, 5, 0.01)
    assert (cfg.generator_lr, cfg.log_base, cfg.inner_eps) == (0.02, "10", 0.8)
    assert (cfg.student_optimizer, cfg.student_lr, cfg.student_weight_decay) == ("sgd", 0.1, 5e-4)
    schedule = schedules.named(cfg.schedule, cfg.milestones)
    assert schedule is not None
    rates = [schedule.factor(done / 2000) for done in (0, 799, 800, 1599, 1600, 1999)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("generator", ["upsample", "pyramid"])
def test_the_inner_eps_is_that_of_the_norms_after_convolutions(
    tiny_teacher, tiny_student, generator
):
    method = make(tiny_teacher, tiny_student, generator=generator, inner_eps=0.7)
    found = [one.eps for one in method.generator.modules() if isinstance(one, nn.BatchNorm2d)]
    # The one in front, two or more inside, the one of the head.
    assert found == [1e-5, *[0.7] * (len(found) - 2), 1e-5]
    assert len(found) == 4


# Options and limits


def test_a_sigmoid_makes_images_that_are_normalised_for_the_teacher(tiny_teacher, tiny_student):
    spec = InputSpec.image(1, 8, 8, mean=(0.4,), std=(0.2,))
    method = make(tiny_teacher, tiny_student, spec=spec, generator_head="sigmoid")
    made: list[Tensor] = []
    method.generator.register_forward_hook(lambda module, args, out: made.append(out.detach()))
    loss = method.generation(method.generator, noise())
    assert float(made[0].min()) > 0
    assert float(made[0].max()) < 1
    torch.testing.assert_close(loss.inputs.detach(), (made[0] - 0.4) / 0.2)


def test_it_needs_no_batchnorm_but_a_layer_that_makes_logits(tiny_student):
    teacher = build_model("lenet5", InputSpec.image(1, 16, 16), 3)
    method = make(teacher, tiny_student, spec=InputSpec.image(1, 16, 16))
    loss = method.generation(method.generator, noise())
    with torch.no_grad():
        expected = -teacher.features(loss.inputs).abs().mean()
    assert loss.terms["activation"].item() == pytest.approx(expected.item(), rel=1e-5)

    pooled = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(TeacherError, match="without a linear layer or 1x1 convolution"):
        make(pooled, tiny_student)
