import inspect
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vestige.errors import RecipeError, ShapeError
from vestige.losses.distill import kl_divergence, l1_logits, soft_label_divergence


def draw(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return (
        3 * torch.randn(*shape, generator=rng, dtype=torch.float64),
        3 * torch.randn(*shape, generator=rng, dtype=torch.float64),
    )


def slow_kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """One row, with the sums of the definition."""
    p = [math.exp(value / temperature) for value in teacher]
    q = [math.exp(value / temperature) for value in student]
    p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 2, 6)])
@pytest.mark.parametrize("offset", [2.0, -0.5])
def test_l1_of_a_constant_offset_is_its_size(shape, offset):
    teacher, _ = draw(*shape)
    found = l1_logits(teacher + offset, teacher)
    torch.testing.assert_close(found, torch.full((shape[0],), abs(offset), dtype=torch.float64))


def test_l1_keeps_samples_apart_and_its_mean_is_that_of_all_entries():
    student, teacher = draw(4, 3, 2, 5)
    found = l1_logits(student, teacher)
    slow = [np.abs(s - t).mean() for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    np.testing.assert_allclose(found.numpy(), slow, rtol=1e-12)
    assert found.mean().item() == pytest.approx(F.l1_loss(student, teacher).item(), rel=1e-12)


def test_l1_of_dense_logits_is_that_of_flattened_ones():
    student, teacher = draw(4, 3, 2, 5)
    torch.testing.assert_close(
        l1_logits(student, teacher), l1_logits(student.flatten(1), teacher.flatten(1))
    )


def test_l1_has_no_gradient_where_student_and_teacher_agree():
    teacher, _ = draw(5, 7)
    student = teacher.clone().requires_grad_()
    teacher.requires_grad_()
    l1_logits(student, teacher).mean().backward()
    assert not student.grad.any()
    assert not teacher.grad.any()


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_kl_agrees_with_the_sum_of_its_definition(temperature):
    student, teacher = draw(6, 5)
    slow = [
        slow_kl(s, t, temperature) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)
    ]
    found = kl_divergence(student, teacher, temperature=temperature)
    np.testing.assert_allclose(found.numpy(), slow, rtol=1e-10)


def test_kl_runs_from_teacher_to_student():
    # Teacher (1, 0) and student (1/2, 1/2): KL(t||s) = log 2, while KL(s||t) is huge.
    student, teacher = torch.zeros(1, 2), torch.tensor([[60.0, -60.0]])
    assert kl_divergence(student, teacher).item() == pytest.approx(math.log(2), rel=1e-6)
    assert kl_divergence(teacher, student).item() > 50


def test_kl_reductions_differ_by_the_number_of_classes():
    student, teacher = draw(6, 5)
    batch = kl_divergence(student, teacher)
    torch.testing.assert_close(kl_divergence(student, teacher, reduction="element") * 5, batch)
    by_torch = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    assert batch.mean().item() == pytest.approx(by_torch.item(), rel=1e-10)


@pytest.mark.parametrize("reduction", ["batch", "element"])
def test_kl_of_dense_logits_is_the_mean_over_positions(reduction):
    student, teacher = draw(3, 4, 2, 5)
    rows = [logits.movedim(1, -1).reshape(-1, 4) for logits in (student, teacher)]
    flat = kl_divergence(*rows, reduction=reduction).reshape(3, 10).mean(1)
    torch.testing.assert_close(kl_divergence(student, teacher, reduction=reduction), flat)


def test_kl_ignores_a_shift_of_all_logits_and_has_no_gradient_at_agreement():
    teacher, _ = draw(5, 7)
    student = (teacher + 3.5).requires_grad_()
    loss = kl_divergence(student, teacher).sum()
    loss.backward()
    # float64 rounding of softmax, nothing else.
    assert abs(loss.item()) < 1e-12
    assert student.grad.abs().max() < 1e-12


def test_kl_gradient_stays_of_one_size_over_temperature():
    # Hinton et al.: for T above the logits the gradient tends to (s - t) / K, whatever T.
    student, teacher = draw(4, 6)
    student, teacher = (value - value.mean(1, keepdim=True) for value in (student, teacher))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(
        kl_divergence(student, teacher, temperature=1e4).sum(), student
    )
    # The next order is (logits / T)^2, below 1e-3 of the first here.
    torch.testing.assert_close(gradient, (student - teacher).detach() / 6, rtol=0, atol=1e-3)


def test_kl_is_finite_with_finite_gradient_for_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True)
    loss = kl_divergence(student, teacher)
    loss.sum().backward()
    assert loss.item() == pytest.approx(2e4)
    assert torch.isfinite(student.grad).all()
    assert torch.isfinite(teacher.grad).all()


@pytest.mark.parametrize("loss", [l1_logits, kl_divergence])
def test_gradient_flows_to_both_sides(loss):
    student, teacher = (value.requires_grad_() for value in draw(3, 4))
    assert torch.autograd.gradcheck(loss, (student, teacher))
    loss(student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", [l1_logits, kl_divergence])
@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 3), (4, 1)), ((4, 3, 2, 2), (4, 3)), ((4,), (4,))]
)
def test_shapes_are_not_broadcast(loss, student, teacher):
    # Unwrapped, because the run-time type check of the test run would speak first.
    with pytest.raises(ShapeError, match=r"got .*expected .*check"):
        inspect.unwrap(loss)(torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize("wrong", [{"reduction": "mean"}, {"temperature": 0.0}])
def test_kl_refuses_what_it_does_not_know(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        kl_divergence(*draw(2, 3), **wrong)


def test_divergence_from_soft_labels_is_kl_from_the_logits_they_were_made_of():
    student, teacher = draw(5, 6)
    for temperature in (1.0, 3.0):
        found = soft_label_divergence(
            student, torch.softmax(teacher / temperature, 1), temperature=temperature
        )
        torch.testing.assert_close(found, kl_divergence(student, teacher, temperature=temperature))


def test_divergence_from_one_hot_labels_is_cross_entropy_and_from_none_nothing():
    student, _ = draw(5, 6)
    student.requires_grad_()
    labels = torch.arange(5)
    found = soft_label_divergence(student, F.one_hot(labels, 6).to(student))
    torch.testing.assert_close(found, F.cross_entropy(student, labels, reduction="none"))
    nothing = soft_label_divergence(student, torch.zeros_like(student))
    (gradient,) = torch.autograd.grad(nothing.sum(), student)
    assert not nothing.any()
    assert not gradient.any()


def test_soft_labels_of_another_shape_or_temperature_are_refused():
    with pytest.raises(ShapeError, match=r"got .*expected .*check"):
        inspect.unwrap(soft_label_divergence)(torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(RecipeError, match="temperature"):
        soft_label_divergence(*draw(2, 3), temperature=0.0)
