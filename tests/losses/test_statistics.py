import math

import numpy as np
import pytest
import torch

from vestige.errors import RecipeError, ShapeError
from vestige.losses.statistics import Smoothing, Stats, bn_statistics_loss, smoothed


def draw(*channels: int, seed: int) -> list[Stats]:
    rng = torch.Generator().manual_seed(seed)
    return [
        Stats(
            torch.randn(c, generator=rng, dtype=torch.float64),
            torch.rand(c, generator=rng, dtype=torch.float64),
        )
        for c in channels
    ]


def test_a_shift_of_the_mean_costs_its_size_times_root_c():
    (stored,) = draw(9, seed=0)
    observed = Stats(stored.mean + 0.7, stored.var)
    loss = bn_statistics_loss([observed], [stored])
    assert loss.item() == pytest.approx(0.7 * math.sqrt(9), rel=1e-12)


def test_l2_agrees_with_the_sum_of_norms_over_layers():
    observed, stored = draw(3, 8, 5, seed=0), draw(3, 8, 5, seed=1)
    slow = 0.0
    for seen, kept in zip(observed, stored, strict=True):
        for a, b in zip(seen, kept, strict=True):
            slow += math.sqrt(
                sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True))
            )
    assert bn_statistics_loss(observed, stored).item() == pytest.approx(slow, rel=1e-12)


def test_mse_averages_squares_within_a_layer_and_sums_layers():
    observed, stored = draw(3, 8, seed=0), draw(3, 8, seed=1)
    slow = sum(
        np.square((a - b).numpy()).mean()
        for seen, kept in zip(observed, stored, strict=True)
        for a, b in zip(seen, kept, strict=True)
    )
    assert bn_statistics_loss(observed, stored, norm="mse").item() == pytest.approx(slow, rel=1e-12)


def test_a_layer_at_its_target_adds_neither_loss_nor_gradient():
    met, missed = draw(4, 4, seed=0)
    mean = met.mean.clone().requires_grad_()
    var = met.var.clone().requires_grad_()
    other = (missed.mean + 1).requires_grad_()
    loss = bn_statistics_loss([Stats(mean, var), Stats(other, missed.var)], [met, missed])
    loss.backward()
    assert loss.item() == pytest.approx(2.0, rel=1e-12)
    assert not mean.grad.any()
    assert not var.grad.any()
    torch.testing.assert_close(other.grad, torch.full((4,), 0.5, dtype=torch.float64))


def test_only_exactly_zero_is_guarded():
    # With an eps under the root the gradient this close to the target would be far from unit size.
    (stored,) = draw(1, seed=0)
    mean = (stored.mean + 1e-9).requires_grad_()
    bn_statistics_loss([Stats(mean, stored.var)], [stored]).backward()
    assert mean.grad.item() == pytest.approx(1.0)


def test_relative_statistics_have_no_unit_and_are_averaged_over_layers():
    observed, stored = draw(3, 8, seed=0), draw(3, 8, seed=1)
    one = bn_statistics_loss(observed, stored, norm="relative")

    def scaled(stats: list[Stats]) -> list[Stats]:
        # Another unit in every layer.
        return [Stats(s.mean * u, s.var * u * u) for s, u in zip(stats, (10.0, 0.01), strict=True)]

    same = bn_statistics_loss(scaled(observed), scaled(stored), norm="relative")
    assert same.item() == pytest.approx(one.item(), rel=1e-9)
    again = bn_statistics_loss(observed * 5, stored * 5, norm="relative")
    assert again.item() == pytest.approx(one.item(), rel=1e-9)


def test_a_relative_distance_of_one_is_one_stored_deviation():
    kept = Stats(torch.tensor([2.0, 2.0]).double(), torch.tensor([4.0, 4.0]).double())
    seen = Stats(kept.mean + 2.0, kept.var)
    # 1e-3 of the variance is added to keep dead channels out.
    value = bn_statistics_loss([seen], [kept], norm="relative").item()
    assert value == pytest.approx(1, rel=1e-3)
    wider = Stats(kept.mean, kept.var * math.e)
    value = bn_statistics_loss([wider], [kept], norm="relative").item()
    assert value == pytest.approx(1, rel=1e-3)


def test_a_channel_without_variance_does_not_outweigh_the_others():
    kept = Stats(torch.zeros(4).double(), torch.tensor([1.0, 1.0, 1.0, 1e-12]).double())
    seen = Stats(kept.mean + 0.1, kept.var)
    assert bn_statistics_loss([seen], [kept], norm="relative").item() < 2.5


@pytest.mark.parametrize("norm", ["l2", "mse", "relative"])
def test_gradient_reaches_mean_and_variance(norm):
    (stored,) = draw(4, seed=1)

    def loss(mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return bn_statistics_loss([Stats(mean, var)], [stored], norm=norm)

    seen = [value.requires_grad_() for value in draw(4, seed=0)[0]]
    assert torch.autograd.gradcheck(loss, seen)
    assert all(grad.abs().min() > 0 for grad in torch.autograd.grad(loss(*seen), seen))


def test_mismatches_name_the_layer():
    # (1,) against (4,) would broadcast silently.
    with pytest.raises(ShapeError, match=r"got at layer 1 .*\(1,\).*expected .*\(4,\).*read both"):
        bn_statistics_loss(draw(3, 1, seed=0), draw(3, 4, seed=1))
    with pytest.raises(ShapeError, match="got statistics of 1 observed and 2 stored"):
        bn_statistics_loss(draw(3, seed=0), draw(3, 4, seed=1))
    with pytest.raises(ShapeError, match="at least 1"):
        bn_statistics_loss([], [])


def test_an_unknown_norm_is_refused():
    with pytest.raises(RecipeError, match=r"got norm 'l1'.*'l2', 'mse' or 'relative'"):
        bn_statistics_loss(draw(3, seed=0), draw(3, seed=1), norm="l1")


def test_smoothing_over_batches_is_an_exponential_mean():
    batches = [draw(3, 5, seed=seed) for seed in range(4)]
    earlier = None
    for batch in batches:
        earlier = smoothed(batch, earlier, 0.7)
    for layer in range(2):
        for part in range(2):
            values = [batch[layer][part] for batch in batches]
            # The first batch stands for itself and for all before.
            slow = 0.7**3 * values[0]
            slow = slow + 0.3 * sum(0.7 ** (3 - age) * values[age] for age in (1, 2, 3))
            torch.testing.assert_close(earlier[layer][part], slow)


def test_smoothing_has_no_effect_before_there_is_a_mean_or_without_momentum():
    observed, earlier = draw(3, 5, seed=0), draw(3, 5, seed=1)
    for found in (smoothed(observed, None, 0.9), smoothed(observed, earlier, 0.0)):
        assert isinstance(found, tuple)
        for seen, same in zip(observed, found, strict=True):
            assert torch.equal(seen.mean, same.mean)
            assert torch.equal(seen.var, same.var)


def test_smoothing_lets_the_share_of_the_batch_of_the_gradient_through():
    observed, earlier = (
        [Stats(*(value.requires_grad_() for value in pair)) for pair in draw(3, seed=seed)]
        for seed in (0, 1)
    )
    (mixed,) = smoothed(observed, earlier, 0.75)
    (mixed.mean.sum() + 2 * mixed.var.sum()).backward()
    torch.testing.assert_close(observed[0].mean.grad, torch.full((3,), 0.25).double())
    torch.testing.assert_close(observed[0].var.grad, torch.full((3,), 0.5).double())
    assert earlier[0].mean.grad is None
    assert earlier[0].var.grad is None


def test_smoothing_refuses_what_does_not_fit():
    for momentum in (1.0, -0.1, math.nan):
        with pytest.raises(RecipeError, match=r"got momentum .*in \[0, 1\)"):
            smoothed(draw(3, seed=0), draw(3, seed=1), momentum)
    with pytest.raises(ShapeError, match="got statistics of 1 observed and 2 earlier layers"):
        smoothed(draw(3, seed=0), draw(3, 4, seed=1), 0.9)


def test_statistics_of_earlier_batches_fade():
    smoothing = Smoothing(0.9)
    for value in (1.0, 2.0):
        smoothing.mixed((Stats(torch.tensor([7.0]), torch.tensor([7.0])),))  # an earlier iteration
        smoothing.mixed((Stats(torch.tensor([value]), torch.tensor([value])),))
        smoothing.update()
    assert smoothing.earlier is not None
    torch.testing.assert_close(smoothing.earlier[0].mean, torch.tensor([0.9 * 1.0 + 0.1 * 2.0]))
    copied = Smoothing(0.9)
    copied.load_state_dict(smoothing.state_dict())
    assert copied.earlier is not None
    assert torch.equal(copied.earlier[0].var, smoothing.earlier[0].var)


def test_statistics_that_are_mixed_have_a_gradient_and_keep_none():
    smoothing = Smoothing(0.5)
    smoothing.mixed((Stats(torch.zeros(1), torch.ones(1)),))
    smoothing.update()
    mean = torch.ones(1, requires_grad=True)
    mixed = smoothing.mixed((Stats(mean, torch.ones(1)),))
    assert torch.autograd.grad(mixed[0].mean.sum(), mean)[0].item() == 0.5
    smoothing.update()
    assert smoothing.earlier is not None
    assert not smoothing.earlier[0].mean.requires_grad
