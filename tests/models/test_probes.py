import math

import numpy as np
import pytest
import torch
from torch import nn

from vestige.errors import ContractError, NoBatchNormError
from vestige.losses.statistics import bn_statistics_loss
from vestige.models.probes import BatchNormProbe, batchnorm_layers


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
    )
    for layer in (net[1], net[4]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return net.double().eval()


def draw(*shape: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def hooks(net: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in net.modules())


def slow_stats(values: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and biased variance over batch and positions, channel by channel."""
    means, variances = [], []
    for channel in range(values.shape[1]):
        numbers = values[:, channel].ravel().tolist()
        mean = sum(numbers) / len(numbers)
        means.append(mean)
        variances.append(sum((number - mean) ** 2 for number in numbers) / len(numbers))
    return means, variances


def test_observes_the_input_of_each_layer_in_order(teacher):
    inputs = draw(4, 2, 8, 8)
    with BatchNormProbe(teacher) as probe:
        teacher(inputs)
    assert probe.names == ("1", "4")
    for index, seen in zip((1, 4), probe.observed(), strict=True):
        mean, var = slow_stats(teacher[:index](inputs).detach().numpy())
        np.testing.assert_allclose(seen.mean.detach().numpy(), mean, atol=1e-12)
        np.testing.assert_allclose(seen.var.detach().numpy(), var, rtol=1e-12)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (6, 3)),
        (nn.BatchNorm1d(3), (6, 3, 4)),
        (nn.BatchNorm3d(3), (2, 3, 2, 2, 2)),
    ],
)
def test_statistics_are_over_batch_and_all_positions(layer, shape):
    inputs = draw(*shape)
    layer.double().eval()
    with BatchNormProbe(layer) as probe:
        layer(inputs)
    mean, var = slow_stats(inputs.numpy())
    np.testing.assert_allclose(probe.observed()[0].mean.numpy(), mean, atol=1e-12)
    np.testing.assert_allclose(probe.observed()[0].var.numpy(), var, rtol=1e-12)


def test_stored_are_the_running_statistics_and_carry_no_gradient(teacher):
    stored = BatchNormProbe(teacher).stored()
    assert torch.equal(stored[1].mean, teacher[4].running_mean)
    assert torch.equal(stored[1].var, teacher[4].running_var)
    assert not any(value.requires_grad for stats in stored for value in stats)


def test_loss_is_zero_for_inputs_that_have_the_stored_statistics(teacher):
    inputs = draw(4, 2, 8, 8).requires_grad_()
    with torch.no_grad():
        for layer in (teacher[1], teacher[4]):
            with BatchNormProbe(teacher) as probe:
                teacher(inputs)
            seen = probe.observed()[probe.names.index("1" if layer is teacher[1] else "4")]
            layer.running_mean.copy_(seen.mean)
            layer.running_var.copy_(seen.var)
    with BatchNormProbe(teacher) as probe:
        teacher(inputs)
    loss = bn_statistics_loss(probe.observed(), probe.stored())
    loss.backward()
    assert loss.item() == 0
    assert not inputs.grad.any()


def test_loss_of_shifted_inputs_is_the_shift_times_root_c():
    layer = nn.BatchNorm2d(7).double().eval()
    inputs = draw(4, 7, 3, 3)
    inputs -= inputs.mean((0, 2, 3), keepdim=True)
    inputs /= inputs.var((0, 2, 3), correction=0, keepdim=True).sqrt()
    with BatchNormProbe(layer) as probe:
        layer(inputs - 0.3)
    loss = bn_statistics_loss(probe.observed(), probe.stored())
    assert loss.item() == pytest.approx(0.3 * math.sqrt(7), rel=1e-10)


def test_descent_on_the_inputs_brings_the_statistics_closer(teacher):
    inputs = draw(4, 2, 8, 8).requires_grad_()

    def loss(values: torch.Tensor) -> torch.Tensor:
        with BatchNormProbe(teacher) as probe:
            teacher(values)
            return bn_statistics_loss(probe.observed(), probe.stored())

    before = loss(inputs)
    (gradient,) = torch.autograd.grad(before, inputs)
    assert loss(inputs - gradient) < before


def test_a_probe_changes_neither_output_nor_buffers(teacher):
    inputs = draw(4, 2, 8, 8)
    plain = teacher(inputs)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    with BatchNormProbe(teacher):
        watched = teacher(inputs)
    assert torch.equal(plain, watched)
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())


def test_the_last_forward_counts(teacher):
    first, second = draw(4, 2, 8, 8), 3 * draw(5, 2, 8, 8)
    with BatchNormProbe(teacher) as probe:
        teacher(first)
        earlier = probe.observed()
        teacher(second)
        later = probe.observed()
    with BatchNormProbe(teacher) as alone:
        teacher(second)
    assert torch.equal(later[0].mean, alone.observed()[0].mean)
    assert not torch.equal(later[0].mean, earlier[0].mean)


def test_hooks_are_gone_after_the_with_and_after_an_exception(teacher):
    with BatchNormProbe(teacher):
        assert hooks(teacher) > 0
    assert hooks(teacher) == 0
    with pytest.raises(ZeroDivisionError), BatchNormProbe(teacher):
        teacher(draw(4, 2, 8, 8))
        raise ZeroDivisionError
    assert hooks(teacher) == 0
    with pytest.raises(RuntimeError), BatchNormProbe(teacher):
        teacher(draw(4, 9, 8, 8))
    assert hooks(teacher) == 0


def test_two_probes_watch_one_network_independently(teacher):
    with BatchNormProbe(teacher) as outer:
        with BatchNormProbe(teacher[3:]) as inner:
            teacher(draw(4, 2, 8, 8))
        assert hooks(teacher) == 3
    assert torch.equal(inner.observed()[0].mean, outer.observed()[1].mean)


def test_reading_before_a_forward_is_refused(teacher):
    probe = BatchNormProbe(teacher)
    with probe, pytest.raises(ContractError, match=r"got no statistics of 2 of 2.*expected.*call"):
        probe.observed()
    with probe:
        teacher(draw(4, 2, 8, 8))
    with probe, pytest.raises(ContractError):
        probe.observed()


def test_a_layer_that_the_last_forward_skipped_is_not_read_from_an_earlier_one():
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always = nn.BatchNorm1d(3)
            self.sometimes = nn.BatchNorm1d(3)
            self.skips = False

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            outputs = self.always(inputs)
            return outputs if self.skips else self.sometimes(outputs)

    net = Optional()
    with BatchNormProbe(net) as probe:
        net(torch.randn(4, 3))
        probe.observed()
        net.skips = True
        net(torch.randn(4, 3))
        with pytest.raises(ContractError, match="'sometimes'"):
            probe.observed()


def test_entering_twice_is_refused_and_leaves_the_first_in_order(teacher):
    probe = BatchNormProbe(teacher)
    with probe:
        with pytest.raises(ContractError, match="entered already"):
            probe.__enter__()
        teacher(draw(4, 2, 8, 8))
        assert len(probe.observed()) == 2
    assert hooks(teacher) == 0


def test_low_precision_is_measured_in_float32():
    layer = nn.BatchNorm1d(1).to(torch.bfloat16).eval()
    values = (100 + torch.linspace(-1, 1, 64)).to(torch.bfloat16).unsqueeze(1)
    with BatchNormProbe(layer) as probe:
        layer(values)
    (seen,) = probe.observed()
    assert seen.mean.dtype == seen.var.dtype == torch.float32
    # float32 rounding; bfloat16 would be off by up to 0.4 %.
    assert seen.mean.item() == pytest.approx(values.double().mean().item(), rel=1e-5)
    assert seen.var.item() == pytest.approx(values.double().var(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)),
        nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)),
        nn.InstanceNorm2d(2, track_running_stats=True),
    ],
)
def test_a_network_without_running_statistics_is_refused(net):
    assert batchnorm_layers(net) == {}
    with pytest.raises(NoBatchNormError, match=r"got a .*expected at least 1; use a method"):
        BatchNormProbe(net)


def test_only_layers_with_running_statistics_are_found(teacher):
    net = nn.ModuleDict({"teacher": teacher, "bare": nn.BatchNorm1d(2, track_running_stats=False)})
    assert batchnorm_layers(net) == {"teacher.1": teacher[1], "teacher.4": teacher[4]}
