"""PRE-DFKD's invariants, from the paper and its reference code."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vestige.core.types import Batch, InputSpec, Step
from vestige.methods.pre_dfkd import PreDFKD, PreDFKDConfig
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.context import RunContext

SPEC = InputSpec.image(1, 8, 8)
SMALL = {
    "rounds": 2,
    "iterations": 2,
    "student_steps": 3,
    "memory_steps": 2,
    "batch_size": 16,
    "generator_width": 2,
    "latent_dim": 5,
}


def make(teacher: nn.Module, student: nn.Module, **settings: Any) -> PreDFKD:
    torch.manual_seed(0)
    cfg = PreDFKDConfig(**{**SMALL, **settings})
    return PreDFKD(cfg, Classification(SPEC, 3), [WhiteBoxTeacher(teacher)], student, {})


def context() -> RunContext:
    return RunContext(
        seed=0,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=lambda: True,
    )


def noise(rows: int = 16) -> Batch:
    return Batch(latent=torch.randn(rows, 5, generator=torch.Generator().manual_seed(5)))


class Fixed(nn.Module):
    """Logits that do not depend on the input but for a gradient."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.features = nn.Linear(64, 3, bias=False)
        self.logits = logits

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits[: len(inputs)] + 0 * self.features(inputs.flatten(1))


def test_a_student_that_equals_the_teacher_has_a_disagreement_of_one(tiny_teacher):
    method = make(tiny_teacher, copy.deepcopy(tiny_teacher))
    loss = method.generation(method.generator, noise())
    # J is 0 where P = Q = M.
    assert loss.terms["adversarial"].item() == pytest.approx(1.0, abs=1e-7)
    batch = Batch(torch.randn(4, 1, 8, 8))
    assert method.imitation(method.student, batch).total.item() == 0


def test_the_generators_loss_is_the_reference_codes(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, one_hot_weight=1.5, adversarial_weight=0.5)
    loss = method.generation(method.generator, noise())
    inputs = loss.inputs
    t, s = tiny_teacher(inputs), loss.student.logits
    features = tiny_teacher[:5](inputs)
    probs = t.softmax(1).mean(0)
    one_hot = nn.functional.cross_entropy(t, t.argmax(1))
    balance = (probs * probs.log10()).sum()
    p, q = (t / 3).softmax(1), (s / 3).softmax(1)
    m = (p + q) / 2
    p, q, m = (x.clamp(0.01, 0.99) for x in (p, q, m))
    kl = nn.functional.kl_div
    j = 0.5 * (kl(p.log(), m, reduction="none") + kl(q.log(), m, reduction="none")).mean()
    expected = 1.5 * one_hot + 5 * balance - 0.1 * features.abs().mean() + 0.5 * (1 - j)
    torch.testing.assert_close(loss.total, expected)


def test_the_disagreement_reaches_the_generator_through_the_student_alone(
    tiny_teacher, tiny_student
):
    only = {"one_hot_weight": 0.0, "balance_weight": 0.0, "activation_weight": 0.0}

    def grads(student: nn.Module) -> list[Tensor]:
        method = make(tiny_teacher, student, **only)
        loss = method.generation(method.generator, noise())
        return list(torch.autograd.grad(loss.total, list(method.generator.parameters())))

    assert any(grad.any() for grad in grads(tiny_student))
    # A student whose answer does not depend on the input passes nothing on, the teacher neither.
    assert not any(grad.any() for grad in grads(Fixed(torch.randn(16, 3))))


def test_a_class_without_probability_leaves_the_gradient_finite(tiny_student):
    logits = torch.tensor([[200.0, 0.0, -200.0]]).repeat(16, 1)
    method = make(Fixed(logits), tiny_student)
    loss = method.generation(method.generator, noise())
    assert loss.terms["class_balance"].item() == pytest.approx(0.0, abs=1e-6)
    grads = torch.autograd.grad(loss.total, list(method.generator.parameters()))
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_classes_that_are_all_alike_have_the_least_balance(tiny_student):
    method = make(Fixed(torch.zeros(16, 3)), tiny_student)
    loss = method.generation(method.generator, noise())
    assert loss.terms["class_balance"].item() == pytest.approx(-math.log10(3), abs=1e-6)


def test_the_student_sees_an_eighth_of_remembered_images(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    fresh, batch = method.fakes(context())
    assert (len(fresh), len(batch)) == (16, 18)
    assert torch.equal(batch.inputs[:16], fresh)
    assert batch.extra["fresh"].tolist() == [True] * 16 + [False] * 2
    assert not batch.inputs.requires_grad


def steps(method: PreDFKD) -> list[Step]:
    return list(method.run(context()))


def test_the_order_is_the_papers(tiny_teacher, tiny_student):
    roles = [step.role for step in steps(make(tiny_teacher, tiny_student))]
    taught = ["student", "auxiliary"]
    assert roles == 4 * ["source", *taught, *taught, "student"]


def test_in_the_first_iteration_there_is_nothing_to_remember(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    counts = []
    method.encoder.register_forward_hook(lambda m, args, out: counts.append(len(args[0])))
    steps(method)
    # Half of the new images, then an eighth of remembered ones as well.
    assert counts == [8, 8] + [10] * 6


def test_no_image_is_stored(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    steps(method)
    assert all(isinstance(part, nn.Module) for part in method.parts().values())


def test_only_what_a_step_is_for_moves(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student)
    nets = {n: p for n, p in method.parts().items() if isinstance(p, nn.Module)}
    moves = {
        "source": {"generator"},
        "student": {"student"},
        "auxiliary": {"encoder", "memory_generator"},
    }

    def weights() -> dict[str, list[Tensor]]:
        return {n: [p.detach().clone() for p in net.parameters()] for n, net in nets.items()}

    before = weights()
    for step in method.run(context()):
        after = weights()
        moved = {
            name
            for name in nets
            if any(not torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
        }
        assert moved == moves[step.role]
        before = after


@pytest.mark.parametrize("spectral", [True, False])
def test_convolutions_of_the_generator_have_norm_one(tiny_teacher, tiny_student, spectral):
    method = make(tiny_teacher, tiny_student, spectral_norm=spectral)
    method.generator.train()
    for _ in range(50):  # the power iteration goes on with each forward
        method.generator(noise().latent)
    norms = [
        float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2))
        for layer in method.generator.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    assert len(norms) == 3
    assert all(abs(norm - 1) < 0.02 for norm in norms) == spectral
    assert not any("original" in name for name, _ in method.memory_generator.named_parameters())


def test_without_replay_there_is_no_memory_at_all(tiny_teacher, tiny_student):
    method = make(tiny_teacher, tiny_student, replay=0)
    before = copy.deepcopy(method.memory_generator.state_dict())
    fresh, batch = method.fakes(context())
    assert torch.equal(batch.inputs, fresh)
    assert {step.role for step in steps(method)} == {"source", "student"}
    after = method.memory_generator.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    passes = method.passes(method.cfg)
    assert not any(count for name, count in passes.items() if name.startswith(("enc", "mem")))
    # One generation and three imitations, twice.
    assert passes["teacher_forward"] == 2 * 4
