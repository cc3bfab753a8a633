"""What is remembered, and how: chunks that are kept and images that are made again."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vestige.core.protocols import Stateful
from vestige.core.types import Batch, InputSpec
from vestige.errors import ContractError, ShapeError
from vestige.losses.prior import class_balance_loss, one_hot_loss
from vestige.models.replay_vae import replay_networks
from vestige.sources.replay import ChunkBank, GenerativeReplay
from vestige.teachers.white_box import WhiteBoxTeacher

SPEC = InputSpec.image(1, 8, 8)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chunk(number: float, rows: int = 2) -> Tensor:
    return torch.full((rows, 3), float(number)) + torch.arange(rows).view(-1, 1) / 10


def content(bank: ChunkBank) -> set[float]:
    draws = rng(7)
    return {bank.draw(draws).inputs[0, 0].item() for _ in range(200)}


def test_only_the_newest_chunks_stay():
    bank = ChunkBank(3)
    for number in range(7):
        bank.push(chunk(number))
        assert len(bank) == min(3, number + 1)
        # 200 draws of at most 3: one is missed with probability below 1e-35.
        assert content(bank) == set(map(float, range(max(0, number - 2), number + 1)))


def test_a_chunk_comes_whole_and_with_its_answers():
    bank = ChunkBank(4)
    for number in range(4):
        bank.push(chunk(number, 3), 10 * chunk(number, 3))
    draws = rng(1)
    for _ in range(10):
        drawn = bank.draw(draws)
        assert torch.equal(drawn.inputs, chunk(round(drawn.inputs[0, 0].item()), 3))
        assert torch.equal(drawn.answers, 10 * drawn.inputs)


def test_the_first_push_decides_the_rows():
    bank = ChunkBank(2)
    assert bank.rows == 0
    bank.push(chunk(0, 3))
    bank.push(chunk(1, 5))
    assert bank.rows == 3
    assert torch.equal(bank.state_dict()["inputs"][""][1], chunk(1, 5)[:3])
    bank.push(chunk(2, 2))
    assert torch.equal(bank.state_dict()["inputs"][""][0], chunk(2, 2)[[0, 1, 0]])


def test_drawing_is_uniform_and_decided_by_the_generator():
    bank = ChunkBank(4)
    for number in range(4):
        bank.push(chunk(number))

    def drawn(seed: int, count: int = 40) -> list[int]:
        draws = rng(seed)
        return [int(bank.draw(draws).inputs[0, 0]) for _ in range(count)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    counts = torch.bincount(torch.tensor(drawn(3, 2000)), minlength=4)
    # 500 each with deviation 19: five of them.
    assert ((counts - 500).abs() < 97).all()


def test_answers_are_kept_as_long_as_all_have_them():
    bank = ChunkBank(2)
    bank.push(chunk(0), chunk(0))
    bank.push(chunk(1))
    assert bank.draw(rng()).answers is None
    bank.push(chunk(2), chunk(2))
    assert bank.draw(rng()).answers is None


def test_a_bank_comes_back_as_it_was():
    first, second = ChunkBank(3), ChunkBank(3)
    for number in range(5):
        first.push(chunk(number), chunk(-number))
    assert isinstance(first, Stateful)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for bank in (first, second):
        bank.push(chunk(5), chunk(-5))
    for seed in range(10):
        one, other = first.draw(rng(seed)), second.draw(rng(seed))
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.answers, other.answers)
    empty = ChunkBank(3)
    second.load_state_dict(empty.state_dict())
    assert len(second) == 0
    with pytest.raises(ContractError, match="push first"):
        second.draw(rng())


def test_several_tensors_stay_together():
    bank = ChunkBank(2)
    for number in range(3):
        bank.push({"a": chunk(number), "b": chunk(number)[:, 0]})
    drawn = bank.draw(rng()).inputs
    assert set(drawn) == {"a", "b"}
    assert torch.equal(drawn["a"][:, 0], drawn["b"])


def test_chunks_keep_no_graph_and_share_no_memory():
    bank = ChunkBank(1)
    given = chunk(1).requires_grad_(True)
    bank.push(given)
    with torch.no_grad():
        given.zero_()
    drawn = bank.draw(rng()).inputs
    assert not drawn.requires_grad
    assert torch.equal(drawn, chunk(1))


@pytest.mark.parametrize(
    ("inputs", "answers", "match"),
    [
        (torch.zeros(0, 3), None, "at least 1"),
        (torch.zeros(2, 3), torch.zeros(3, 3), "as many of both"),
        (torch.zeros(2, 4), None, "as in the first chunk"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(inputs, answers, match):
    bank = ChunkBank(2)
    bank.push(chunk(0), chunk(0))
    with pytest.raises(ShapeError, match=match):
        bank.push(inputs, answers)
    with pytest.raises(ContractError, match="at least 1 chunk"):
        ChunkBank(0)


# Made again


def replay(teacher: nn.Module, **settings: Any) -> GenerativeReplay:
    torch.manual_seed(4)
    networks = replay_networks(SPEC, latent_dim=6, width=4)
    return GenerativeReplay(WhiteBoxTeacher(teacher), *networks, nn.Identity(), **settings)


def test_codes_take_one_step_of_adam(tiny_teacher):
    memory = replay(tiny_teacher)
    made = memory.draw(5, rng(3))
    codes = torch.randn(5, 6, generator=rng(3)).requires_grad_(True)
    optimizer = torch.optim.Adam([codes], lr=0.02)
    memory.generator.eval()
    logits = tiny_teacher(memory.generator(codes))
    probs = logits.softmax(1).mean(0)
    moments = (codes.var(0) - 1).square().mean() + codes.mean(0).square().mean()
    sure = nn.functional.cross_entropy(logits, logits.argmax(1))
    (5 * (probs * probs.log10()).sum() + sure + moments).backward()
    optimizer.step()
    torch.testing.assert_close(made, memory.generator(codes).detach(), rtol=1e-4, atol=1e-5)


def test_without_a_step_the_codes_are_plain_noise(tiny_teacher):
    memory = replay(tiny_teacher, latent_lr=0.0)
    made = memory.draw(5, rng(3))
    memory.generator.eval()
    expected = memory.generator(torch.randn(5, 6, generator=rng(3)))
    assert torch.equal(made, expected.detach())


def test_drawing_leaves_no_trace(tiny_teacher):
    memory = replay(tiny_teacher)
    memory.generator.train()
    before = {n: v.clone() for n, v in memory.generator.state_dict().items()}
    images = memory.draw(4, rng())
    assert not images.requires_grad
    assert memory.generator.training
    after = memory.generator.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for p in memory.generator.parameters())
    assert all(p.grad is None for p in tiny_teacher.parameters())


def test_reconstruction_is_the_sum_of_its_terms(tiny_teacher):
    memory = replay(tiny_teacher, divergence_weight=0.5)
    fresh = torch.randn(6, 1, 8, 8)
    batch = memory.target(fresh, 0, rng())
    assert torch.equal(batch.inputs, fresh)
    loss = memory.loss(None, batch)
    mean, log_variance = memory.encoder(fresh)
    images = memory.generator(mean + batch.extra["noise"] * (log_variance / 2).exp())
    expected = {
        "images": (images - fresh).abs().mean(),
        "answers": (tiny_teacher(images) - tiny_teacher(fresh)).abs().mean(),
        "divergence": (
            -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
        ).mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(loss.terms[name], value)
    total = expected["images"] + expected["answers"] + 0.5 * expected["divergence"]
    torch.testing.assert_close(loss.total, total)


def test_remembered_rows_follow_the_fresh_ones(tiny_teacher):
    memory = replay(tiny_teacher)
    fresh = torch.randn(6, 1, 8, 8)
    batch = memory.target(fresh, 3, rng(2))
    assert torch.equal(batch.inputs[:6], fresh)
    assert len(batch) == 9
    assert batch.extra["noise"].shape == (9, 6)
    # Made in train mode: their own batch statistics.
    made = batch.inputs[6:]
    torch.testing.assert_close(made.mean(), torch.zeros(()), atol=1e-5, rtol=0)


def gradients(memory: GenerativeReplay, batch: Batch) -> list[Tensor]:
    weights = list(memory.generator.parameters())
    return list(torch.autograd.grad(memory.loss(None, batch).total, weights))


def test_the_leak_of_the_public_code_is_the_gradient_of_the_codes_step(tiny_teacher):
    fresh = torch.randn(6, 1, 8, 8)
    plain, leaking = replay(tiny_teacher), replay(tiny_teacher, leak_latent_grad=True)
    one = gradients(plain, plain.target(fresh, 3, rng(2)))
    other = gradients(leaking, leaking.target(fresh, 3, rng(2)))
    codes = torch.randn(3, 6, generator=rng(2))
    third = replay(tiny_teacher)
    third.generator.train()
    logits = tiny_teacher(third.generator(codes))
    tuning = one_hot_loss(logits).mean() + 5 * class_balance_loss(logits, base=10.0)
    leak = torch.autograd.grad(tuning, list(third.generator.parameters()))
    for grad, expected, extra in zip(other, one, leak, strict=True):
        torch.testing.assert_close(grad, expected + extra, rtol=1e-3, atol=1e-5)
    # Nothing was replayed, so nothing leaks.
    assert "leaked" not in leaking.loss(None, leaking.target(fresh, 0, rng())).terms


def test_it_learns_to_make_what_it_saw_again(tiny_teacher):
    memory = replay(tiny_teacher)
    draws = rng(5)
    seen = torch.randn(1, 1, 8, 8, generator=draws).expand(16, 1, 8, 8)
    seen = seen + 0.1 * torch.randn(16, 1, 8, 8, generator=draws)
    weights = [*memory.encoder.parameters(), *memory.generator.parameters()]
    optimizer = torch.optim.Adam(weights, 5e-3)
    losses = []
    for step in range(60):
        loss = memory.loss(None, memory.target(seen, 4 if step else 0, draws))
        losses.append(float(loss.terms["images"].detach()))
        optimizer.zero_grad()
        loss.total.backward(inputs=weights)
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
