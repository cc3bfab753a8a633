import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn

from vestige.errors import RecipeError, ShapeError
from vestige.losses.adversarial import (
    decision_aware_disagreement,
    disagreement_loss,
    js_disagreement,
    log_form,
    patch_loss,
)
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


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=rng, dtype=torch.float64)


def test_where_both_name_the_same_class_it_is_the_kl_divergence_else_nothing():
    student, teacher = logits(40, 3), logits(40, 3, seed=1)
    agree = student.argmax(1) == teacher.argmax(1)
    assert 5 < agree.sum() < 35
    found = decision_aware_disagreement(student, teacher)
    torch.testing.assert_close(found[agree], kl_divergence(student, teacher)[agree])
    assert (found[agree] > 0).all()
    assert not found[~agree].any()


def test_a_perfect_student_has_no_decision_aware_disagreement(nets):
    _, teacher, inputs = nets
    loss = decision_aware_disagreement(teacher(inputs), teacher(inputs))
    (gradient,) = torch.autograd.grad(loss.sum(), inputs)
    # Rounding of softmax in float64.
    assert loss.abs().max() < 1e-14
    assert gradient.abs().max() < 1e-14


def test_a_student_that_differs_everywhere_is_left_alone():
    teacher = logits(9, 4).requires_grad_()
    # The opposite order: the class that leads is another one.
    student = (-teacher.detach()).requires_grad_()
    loss = decision_aware_disagreement(student, teacher)
    loss.sum().backward()
    assert not loss.any()
    assert not student.grad.any()
    assert not teacher.grad.any()


def test_agreed_inputs_are_moved_through_both_networks(nets):
    student, teacher, inputs = nets
    s, t = student(inputs), teacher(inputs)
    agree = s.argmax(1) == t.argmax(1)
    assert agree.any()
    assert not agree.all()

    def gradient(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        loss = decision_aware_disagreement(s, t).sum()
        return torch.autograd.grad(loss, inputs, retain_graph=True)[0]

    both, first, second = gradient(s, t), gradient(s.detach(), t), gradient(s, t.detach())
    torch.testing.assert_close(both, first + second)
    for part in (first, second):
        assert part[agree].abs().amax(1).min() > 1e-6
        assert not part[~agree].any()


def slow_js(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """One row, in the order of DeepInversion's code: mix, then clamp, then KL(M || .)."""
    p, q = (np.exp(row / temperature) for row in (student, teacher))
    p, q = p / p.sum(), q / q.sum()
    m = 0.5 * (p + q)
    p, q, m = (np.clip(probs, 0.01, 0.99) for probs in (p, q, m))
    total = 0.0
    for a, b, c in zip(p, q, m, strict=True):
        total += 0.5 * c * math.log(c / a) + 0.5 * c * math.log(c / b)
    return total


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_js_agrees_with_its_loop(temperature):
    student, teacher = logits(8, 6), logits(8, 6, seed=1)
    slow = [
        slow_js(s, t, temperature) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)
    ]
    found = js_disagreement(student, teacher, temperature=temperature)
    np.testing.assert_allclose(found.numpy(), slow, rtol=1e-10, atol=1e-14)
    element = js_disagreement(student, teacher, temperature=temperature, reduction="element")
    torch.testing.assert_close(element * 6, found)


def test_js_has_its_arguments_in_the_reverse_order():
    # P = (0.8, 0.2), Q = (0.2, 0.8): here log(0.5 / 0.4), while the textbook has 0.193.
    student = 3 * torch.tensor([[0.8, 0.2]]).double().log()
    teacher = 3 * torch.tensor([[0.2, 0.8]]).double().log()
    assert js_disagreement(student, teacher).item() == pytest.approx(math.log(1.25), rel=1e-7)
    # Of two sure answers, clamped: above 1, so that callers clamp it.
    far = js_disagreement(1e3 * student, 1e3 * teacher).item()
    assert far == pytest.approx(math.log(0.5) - math.log(0.0099) / 2, rel=1e-7)
    assert far > 1


@pytest.mark.parametrize("reduction", ["batch", "element"])
def test_js_is_symmetric_and_zero_with_no_gradient_for_equal_logits(reduction):
    student, teacher = logits(5, 4).requires_grad_(), logits(5, 4, seed=1)
    torch.testing.assert_close(
        js_disagreement(student, teacher, reduction=reduction),
        js_disagreement(teacher, student, reduction=reduction),
    )
    same = js_disagreement(student, student.detach() + 2, reduction=reduction)
    same.sum().backward()
    assert same.abs().max() < 1e-14
    assert student.grad.abs().max() < 1e-14


def test_js_has_the_gradient_of_its_value_on_both_sides():
    student, teacher = (0.5 * logits(3, 4, seed=seed) for seed in (0, 1))
    student.requires_grad_()
    teacher.requires_grad_()
    # No probability is clamped at temperature 3, where finite differences would see a kink.
    assert (student / 3).softmax(1).min() > 0.02
    assert torch.autograd.gradcheck(js_disagreement, (student, teacher))
    js_disagreement(student, teacher).sum().backward()
    assert student.grad.abs().min() > 0
    assert teacher.grad.abs().min() > 0


def test_js_sees_nothing_of_many_classes_that_are_all_improbable():
    student, teacher = (0.1 * logits(2, 300, seed=seed) for seed in (0, 1))
    student.requires_grad_()
    loss = js_disagreement(student, teacher)
    loss.sum().backward()
    assert (student / 3).softmax(1).max() < 0.01
    # Logarithms of the same 0.01 cancel up to rounding.
    assert loss.abs().max() < 1e-12
    assert not student.grad.any()


def test_js_does_not_broadcast():
    # Unwrapped, because the run-time type check of the test run would speak first.
    with pytest.raises(ShapeError, match=r"got .*\(4, 3\).*\(4, 1\), expected .*check"):
        inspect.unwrap(js_disagreement)(torch.zeros(4, 3), torch.zeros(4, 1))


def test_js_refuses_what_it_does_not_know():
    with pytest.raises(RecipeError, match="got reduction 'mean', expected 'batch' or 'element'"):
        js_disagreement(logits(2, 3), logits(2, 3), reduction="mean")
    with pytest.raises(RecipeError, match="got temperature 0"):
        js_disagreement(logits(2, 3), logits(2, 3), temperature=0.0)


def test_patches_of_which_nobody_knows_cost_log_2_each():
    # mosaickd.md: 64 patches of a 32x32 image.
    logits = torch.zeros(3, 1, 8, 8, dtype=torch.float64)
    for given in (True, False):
        expected = torch.full((3,), 64 * math.log(2), dtype=torch.float64)
        torch.testing.assert_close(patch_loss(logits, given=given), expected)


def test_patch_loss_is_the_sum_of_binary_cross_entropies():
    logits = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    for given in (True, False):
        slow = [
            sum(-math.log(1 / (1 + math.exp(-x if given else x))) for x in row.flatten().tolist())
            for row in logits
        ]
        np.testing.assert_allclose(patch_loss(logits, given=given).numpy(), slow, rtol=1e-12)


def test_patch_loss_pulls_towards_what_it_is_told():
    logits = torch.zeros(1, 1, 2, 2, requires_grad=True)
    patch_loss(logits, given=True).sum().backward()
    torch.testing.assert_close(logits.grad, torch.full((1, 1, 2, 2), -0.5))
