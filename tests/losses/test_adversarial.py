import math

import pytest
import torch
from torch import nn

from vestige.errors import RecipeError
from vestige.losses.adversarial import disagreement_loss, log_form
from vestige.losses.distill import kl_divergence, l1_logits


@pytest.fixture
def nets() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Student, teacher and inputs with gradient."""
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double() for _ in range(2)
    )
    return student, teacher, torch.randn(5, 6, dtype=torch.float64, requires_grad=True)


def test_l1_and_log_form_of_a_constant_offset():
    # dfad.md: with s = t + 2 the generator's losses are -2 and -log 3.
    teacher = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    disagreement = disagreement_loss(teacher + 2, teacher).mean()
    assert -disagreement.item() == pytest.approx(-2)
    assert -log_form(disagreement).item() == pytest.approx(-math.log(3))


@pytest.mark.parametrize("kind", ["l1", "kl"])
def test_gradient_of_the_log_form_is_the_plain_one_divided_by_disagreement_plus_1(nets, kind):
    student, teacher, inputs = nets
    disagreement = disagreement_loss(student(inputs), teacher(inputs), kind=kind).mean()
    (plain,) = torch.autograd.grad(-disagreement, inputs, retain_graph=True)
    (logged,) = torch.autograd.grad(-log_form(disagreement), inputs)
    assert plain.abs().max() > 1e-4
    # dfad.md asks for 1e-6.
    torch.testing.assert_close(logged, plain / (disagreement.detach() + 1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["l1", "kl"])
def test_ascent_makes_the_student_differ_more(nets, kind):
    student, teacher, inputs = nets
    before = disagreement_loss(student(inputs), teacher(inputs), kind=kind).mean()
    (ascent,) = torch.autograd.grad(before, inputs)
    moved = inputs + 0.1 * ascent
    after = disagreement_loss(student(moved), teacher(moved), kind=kind).mean()
    assert after > before > 0


@pytest.mark.parametrize("kind", ["l1", "kl"])
def test_a_perfect_student_leaves_no_gradient(nets, kind):
    _, teacher, inputs = nets
    loss = log_form(disagreement_loss(teacher(inputs), teacher(inputs), kind=kind).mean())
    (gradient,) = torch.autograd.grad(loss, inputs)
    # Rounding of softmax in float64; exactly 0 for "l1".
    assert abs(loss.item()) < 1e-14
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("kind", ["l1", "kl"])
def test_the_inputs_are_moved_through_both_networks(nets, kind):
    student, teacher, inputs = nets

    def gradient(through_student: bool, through_teacher: bool) -> torch.Tensor:
        s, t = student(inputs), teacher(inputs)
        s, t = s if through_student else s.detach(), t if through_teacher else t.detach()
        return torch.autograd.grad(disagreement_loss(s, t, kind=kind).mean(), inputs)[0]

    both, first, second = gradient(True, True), gradient(True, False), gradient(False, True)
    torch.testing.assert_close(both, first + second)
    assert first.abs().max() > 1e-4
    assert second.abs().max() > 1e-4


def test_kinds_are_those_of_distillation_and_others_are_refused(nets):
    student, teacher, inputs = nets
    s, t = student(inputs), teacher(inputs)
    assert torch.equal(disagreement_loss(s, t), l1_logits(s, t))
    assert torch.equal(disagreement_loss(s, t, kind="kl"), kl_divergence(s, t))
    with pytest.raises(RecipeError, match=r"got .*'js'.*expected 'l1' or 'kl'"):
        disagreement_loss(s, t, kind="js")
