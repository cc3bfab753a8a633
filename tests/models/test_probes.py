import math

import numpy as np
import pytest
import torch
from torch import nn

from vestige.core.functional import functional
from vestige.core.types import InputSpec
from vestige.errors import ContractError, NoBatchNormError, RecipeError, TeacherError
from vestige.losses.statistics import bn_statistics_loss
from vestige.models.factory import build_model
from vestige.models.probes import (
    BatchNormProbe,
    FeatureProbe,
    LinearProbe,
    batchnorm_layers,
    penultimate_layer,
    spatial_layers,
)


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


@pytest.mark.parametrize("statistics", [True, False])
def test_instance_means_are_each_rows_own_side_by_side(teacher, statistics):
    inputs = draw(4, 2, 8, 8).requires_grad_()
    with BatchNormProbe(teacher, statistics=statistics, instance_means=True) as probe:
        teacher(inputs)
    expected = [teacher[:index](inputs).mean((2, 3)) for index in (1, 4)]
    torch.testing.assert_close(probe.instance_means(), torch.cat(expected, dim=1))
    # Row 0 depends on image 0 alone.
    (grad,) = torch.autograd.grad(probe.instance_means()[0].sum(), inputs)
    assert grad[0].abs().sum() > 0
    assert grad[1:].abs().sum() == 0


def test_what_was_not_asked_for_is_not_there(teacher):
    with BatchNormProbe(teacher) as probe:
        teacher(draw(4, 2, 8, 8))
    with pytest.raises(ContractError, match="instance_means=True"):
        probe.instance_means()
    with BatchNormProbe(teacher, statistics=False, instance_means=True) as probe:
        teacher(draw(4, 2, 8, 8))
    with pytest.raises(ContractError, match="statistics=True"):
        probe.observed()
    with pytest.raises(ContractError, match="observes nothing"):
        BatchNormProbe(teacher, statistics=False)


def test_statistics_and_instance_means_together_have_the_sum_of_their_gradients(teacher):
    inputs = draw(4, 2, 8, 8).requires_grad_()

    def gradient(probe: BatchNormProbe, *, both: bool) -> torch.Tensor:
        with probe:
            teacher(inputs)
        value = bn_statistics_loss(probe.observed(), probe.stored())
        if both:
            value = value + probe.instance_means().square().sum()
        return torch.autograd.grad(value, inputs)[0]

    together = gradient(BatchNormProbe(teacher, instance_means=True), both=True)
    alone = gradient(BatchNormProbe(teacher), both=False)
    with BatchNormProbe(teacher, statistics=False, instance_means=True) as probe:
        teacher(inputs)
    means = torch.autograd.grad(probe.instance_means().square().sum(), inputs)[0]
    torch.testing.assert_close(together, alone + means)


@pytest.mark.parametrize("of", ["input", "output"])
def test_features_are_what_enters_or_leaves_named_layers(teacher, of):
    inputs = draw(4, 2, 8, 8).requires_grad_()
    with FeatureProbe(teacher, ["3", "1"], of=of) as probe:
        teacher(inputs)
    ends = (3, 1) if of == "input" else (4, 2)
    for seen, end in zip(probe.features(), ends, strict=True):
        torch.testing.assert_close(seen, teacher[:end](inputs))
    assert probe.instance_means().shape == (4, 6 if of == "input" else 8)
    assert torch.autograd.grad(probe.features()[0].sum(), inputs)[0].abs().sum() > 0
    assert hooks(teacher) == 0


def test_a_layer_that_is_not_there_names_the_nearest(teacher):
    net = build_model("resnet18", InputSpec.image(3, 8, 8), 10)
    with pytest.raises(TeacherError, match=r"'stages\.1'"):
        FeatureProbe(net, ["stage.1"])
    with pytest.raises(RecipeError, match="'input' or 'output'"):
        FeatureProbe(net, ["stages.1"], of="gradient")
    with pytest.raises(TeacherError, match="expected names"):
        FeatureProbe(net, [])


def test_probes_see_a_network_at_other_weights(teacher):
    inputs = draw(4, 2, 8, 8)
    weights = {name: 2 * value for name, value in teacher.named_parameters()}
    with FeatureProbe(teacher, ["0"]) as probe:
        functional(teacher, weights)(inputs)
    torch.testing.assert_close(probe.features()[0], 2 * teacher[0](inputs))


def test_a_linear_probe_sees_the_weights_of_that_moment():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    inputs = torch.randn(5, 4)
    moved = {"2.weight": torch.ones(2, 3, requires_grad=True), "0.bias": torch.ones(3)}
    probe = LinearProbe(net, "2")
    with probe:
        logits = functional(net, moved)(inputs)
    seen = probe.read()
    assert seen.weight is moved["2.weight"]
    assert torch.equal(seen.bias, net[2].bias)
    torch.testing.assert_close(nn.functional.linear(*seen), logits)
    with probe:
        net(inputs)
    assert probe.read().weight is net[2].weight
    assert hooks(net) == 0


def test_a_linear_probe_takes_linear_layers_alone():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    for name, told in (("1", "a ReLU"), ("7", "not there"), ("", "a Sequential")):
        with pytest.raises(TeacherError, match=f"got layer '{name}' .* {told}, expected a linear"):
            LinearProbe(net, name)


def test_what_enters_the_penultimate_layer_makes_the_logits():
    net = build_model("wrn-10-1", InputSpec.image(3, 8, 8), 10).eval()
    inputs = draw(2, 3, 8, 8).float()
    with FeatureProbe(net, [penultimate_layer(net)], of="input") as probe:
        logits = net(inputs)
    torch.testing.assert_close(net.classifier(probe.features()[0]), logits)
    torch.testing.assert_close(net.features(inputs), probe.features()[0])


def test_a_network_without_linear_layer_ends_in_a_pointwise_convolution():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 1), nn.Flatten())
    assert penultimate_layer(net) == "1"
    with pytest.raises(TeacherError, match="name the layer yourself"):
        penultimate_layer(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_spatial_layers_are_the_last_of_each_resolution():
    net = build_model("resnet18", InputSpec.image(3, 16, 16), 10)
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    # 16, 8, 4 and 2 pixels; the last block of the last stage is the end of `stages` as well.
    assert spatial_layers(net, (3, 16, 16)) == ("stages.1", "stages.3", "stages.5", "stages")
    assert spatial_layers(net, (3, 16, 16), count=2) == ("stages.5", "stages")
    with pytest.raises(TeacherError, match="4 resolutions"):
        spatial_layers(net, (3, 16, 16), count=5)
    assert net.training
    assert hooks(net) == 0
    for name, value in net.state_dict().items():
        assert torch.equal(value, kept[name]), name
