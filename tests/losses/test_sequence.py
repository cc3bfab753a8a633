"""Losses over tokens against slow loops, and that padding changes nothing."""

import math

import pytest
import torch
from torch import Tensor

from vestige.losses.sequence import token_cross_entropy, token_kl

B, T, V = 3, 5, 7


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(B, T, V, generator=generator) for _ in range(2))
    targets = torch.randint(V, (B, T), generator=generator)
    counted = torch.arange(T) < torch.tensor([[5], [2], [0]])
    return student, teacher, targets, counted


def test_cross_entropy_is_the_sum_over_the_tokens_that_count(case):
    student, _, targets, counted = case
    expected = [
        sum(
            -math.log(float(student[row, at].softmax(-1)[targets[row, at]]))
            for at in range(T)
            if counted[row, at]
        )
        for row in range(B)
    ]
    found = token_cross_entropy(student, targets, counted)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert found[2] == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_is_that_of_the_softened_distributions(case, temperature):
    student, teacher, _, counted = case
    expected = [0.0] * B
    for row in range(B):
        for at in range(T):
            if counted[row, at]:
                p = (teacher[row, at] / temperature).softmax(-1)
                q = (student[row, at] / temperature).softmax(-1)
                expected[row] += float((p * (p / q).log()).sum())
    found = token_kl(student, teacher, counted, temperature=temperature)
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert torch.equal(token_kl(teacher, teacher, counted), torch.zeros(B))


def test_padding_changes_nothing(case):
    student, teacher, targets, counted = case
    wider = [torch.cat([x, 9 * torch.ones(B, 2, V)], 1) for x in (student, teacher)]
    more = torch.cat([targets, torch.zeros(B, 2, dtype=torch.int64)], 1)
    mask = torch.cat([counted, torch.zeros(B, 2, dtype=torch.bool)], 1)
    assert torch.equal(token_kl(*wider, mask), token_kl(student, teacher, counted))
    assert torch.equal(
        token_cross_entropy(wider[0], more, mask), token_cross_entropy(student, targets, counted)
    )


def test_gradient_flows_where_it_counts_only(case):
    student, teacher, _, counted = case
    student.requires_grad_()
    teacher.requires_grad_()
    token_kl(student, teacher.detach(), counted).sum().backward()
    assert student.grad is not None
    assert bool((student.grad.abs().sum(-1) > 0).eq(counted).all())
    assert teacher.grad is None
