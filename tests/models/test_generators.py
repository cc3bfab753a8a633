import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vestige.core.types import count_parameters
from vestige.errors import RecipeError, ShapeError
from vestige.models.generators import (
    ConditionalGenerator,
    DCGANGenerator,
    LargeGenerator,
    PyramidGenerator,
    UpsampleGenerator,
    reinitialize,
)


def noise(batch: int, latent_dim: int) -> torch.Tensor:
    return torch.randn(batch, latent_dim, generator=torch.Generator().manual_seed(0))


def build(kind: type[nn.Module], *args: object, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return kind(*args, **kwargs)


def norm(values: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None):
    return F.batch_norm(values, None, None, weight, bias, training=True)


def slow_upsample(net: nn.Module, latent: torch.Tensor, width: int, side: int) -> torch.Tensor:
    """Generator A with the tanh_bn head, written out from dfad.md."""
    weights = iter(net.parameters())

    def take() -> tuple[torch.Tensor, torch.Tensor]:
        return next(weights), next(weights)

    values = F.linear(latent, *take()).reshape(-1, 2 * width, side // 4, side // 4)
    values = norm(values, *take())
    for _ in range(2):
        values = values.repeat_interleave(2, 2).repeat_interleave(2, 3)
        values = norm(F.conv2d(values, *take(), padding=1), *take())
        values = torch.where(values > 0, values, 0.2 * values)
    values = norm(torch.tanh(F.conv2d(values, *take(), padding=1)), None, None)
    assert next(weights, None) is None
    return values


def slow_dcgan(net: nn.Module, latent: torch.Tensor, width: int, doublings: int) -> torch.Tensor:
    """Generator B, written out from dfad.md."""
    weights = iter(net.parameters())
    values = F.linear(latent, next(weights), next(weights)).reshape(len(latent), -1, 8, 8)
    values = norm(values, next(weights), next(weights))
    for _ in range(doublings):
        values = F.conv_transpose2d(values, next(weights), stride=2, padding=1)
        values = norm(values, next(weights), next(weights))
        values = torch.where(values > 0, values, 0.2 * values)
    values = torch.tanh(F.conv2d(values, next(weights), next(weights), padding=1))
    assert next(weights, None) is None
    return values


@pytest.mark.parametrize("channels", [1, 3])
def test_generator_a_standardises_each_channel_of_a_training_batch(channels):
    net = build(UpsampleGenerator, 20, channels, 32, width=8)
    images = net(noise(16, 20))
    assert images.shape == (16, channels, 32, 32)
    # dfad.md: within 1e-3.
    assert images.mean((0, 2, 3)).abs().max() < 1e-3
    assert (images.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-3


def test_generator_a_is_that_of_the_paper():
    net = build(UpsampleGenerator, 20, 3, 16, width=4)
    latent = noise(8, 20)
    torch.testing.assert_close(net(latent), slow_upsample(net, latent, 4, 16), rtol=1e-4, atol=1e-5)


def test_generator_b_is_that_of_the_paper_and_bounded():
    net = build(DCGANGenerator, 20, 3, 128, width=2)
    latent = noise(4, 20)
    images = net(latent)
    assert images.shape == (4, 3, 128, 128)
    torch.testing.assert_close(images, slow_dcgan(net, latent, 2, 4), rtol=1e-4, atol=1e-5)
    for scale in (1.0, 1e4):
        net.head[0].weight.data.mul_(scale)
        assert net(latent).abs().max() <= 1
    assert images.min() < 0 < images.max()


def test_full_size_networks_have_the_papers_weights():
    # Sums over the layers listed in dfad.md, done by hand.
    assert count_parameters(UpsampleGenerator(100, 1, 32)) == 1_049_985
    assert count_parameters(DCGANGenerator(256, 3, 128)) == 11_243_203
    # DataFree: linear 4,210,688; convolutions 294,912, 73,728 and 1,731; BN 896.
    assert count_parameters(LargeGenerator(256, 3, 32)) == 4_581_955


@pytest.mark.parametrize("head", ["tanh_bn", "sigmoid", "bn"])
def test_a_pyramid_of_two_levels_is_generator_a(head):
    published = build(UpsampleGenerator, 20, 3, 28, width=4, head=head)
    pyramid = PyramidGenerator(20, 3, 28, width=4, head=head)
    pyramid.load_state_dict(published.state_dict())
    latent = noise(8, 20)
    assert torch.equal(pyramid(latent), published(latent))


@pytest.mark.parametrize(
    ("size", "levels"), [(8, 2), ((33, 47), 3), (28, 2), (64, 3), (96, 4), (5, 2), ((16, 224), 5)]
)
def test_a_pyramid_makes_any_size_from_a_small_map(size, levels):
    net = build(PyramidGenerator, 6, 1, size, width=2)
    assert net(noise(3, 6)).shape[2:] == (size if isinstance(size, tuple) else (size, size))
    ups = [part for part in net.modules() if isinstance(part, nn.Upsample)]
    assert len(ups) == levels
    assert max(net.project[1].unflattened_size[1:]) <= 8


def test_generator_b_halves_its_channels_towards_the_image():
    def plan(side: int) -> list[int]:
        net = DCGANGenerator(4, 1, side, width=3)
        layers = [part for part in net.modules() if isinstance(part, nn.ConvTranspose2d)]
        return [layers[0].in_channels, *(layer.out_channels for layer in layers)]

    assert plan(128) == [24, 12, 6, 3, 3]
    assert plan(32) == [6, 3, 3]
    assert plan(16) == [3, 3]
    assert plan(256) == [24, 24, 12, 6, 3, 3]


def test_generator_b_starts_small():
    net = build(DCGANGenerator, 64, 3, 32, width=64)
    for part in net.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            # 1,728 weights or more: the standard deviation is known to 2 %, 10 % is 5 sigma.
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert part.weight.mean().abs() < 0.003
        elif isinstance(part, nn.BatchNorm2d):
            assert part.weight.mean().item() == pytest.approx(1, abs=0.015)
            assert 0.01 < part.weight.std() < 0.03
        if getattr(part, "bias", None) is not None:
            assert not part.bias.any()


def test_heads_have_the_ranges_they_promise():
    latent = noise(8, 6)
    nets = {
        head: build(UpsampleGenerator, 6, 2, 8, width=4, head=head)
        for head in ("tanh_bn", "sigmoid", "bn")
    }
    for net in nets.values():
        net.head[0].weight.data.mul_(50)
    assert nets["sigmoid"](latent).min() >= 0
    assert nets["sigmoid"](latent).max() <= 1
    # Saturated tanh has two values, so standardised ones stay closer than bare convolutions.
    assert nets["tanh_bn"](latent).abs().max() < nets["bn"](latent).abs().max()
    assert not list(nets["tanh_bn"].head[-1].parameters())
    nets["bn"].head[-1].weight.data.fill_(7.0)
    nets["bn"].head[-1].bias.data.fill_(-2.0)
    images = nets["bn"](latent)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.full((2,), -2.0), atol=1e-3, rtol=0)
    assert images.std().item() == pytest.approx(7, rel=0.01)


def test_slope_and_inner_eps_reach_the_layers():
    net = UpsampleGenerator(4, 1, 8, width=2, slope=0.05, inner_eps=0.8)
    assert [part.eps for part in net.modules() if isinstance(part, nn.BatchNorm2d)] == [
        1e-5,
        0.8,
        0.8,
        1e-5,
    ]
    slopes = [
        part.negative_slope
        for generator in (net, DCGANGenerator(4, 1, 16, width=2, slope=0.05))
        for part in generator.modules()
        if isinstance(part, nn.LeakyReLU)
    ]
    assert slopes == [0.05] * 3


@pytest.mark.parametrize(
    ("kind", "size"),
    [(UpsampleGenerator, (12, 20)), (UpsampleGenerator, 4), (DCGANGenerator, (48, 32))],
)
def test_any_fitting_size_works_and_noise_gets_a_gradient(kind, size):
    net = build(kind, 6, 2, size, width=4)
    latent = noise(5, net.latent_dim).requires_grad_()
    images = net(latent)
    assert images.shape == (5, 2, *((size, size) if isinstance(size, int) else size))
    (images * torch.linspace(-1, 1, images.numel()).view_as(images)).sum().backward()
    assert latent.grad.abs().amax(1).min() > 0


@pytest.mark.parametrize(
    ("latent_dim", "classes", "count"), [(100, 10, 682_499), (256, 100, 1_690_115)]
)
def test_a_conditional_generator_has_the_papers_number_of_weights(latent_dim, classes, count):
    assert count_parameters(ConditionalGenerator(latent_dim, classes, 3, 32)) == count


def test_a_conditional_generator_is_generator_a_with_half_of_its_maps_from_the_class():
    net = ConditionalGenerator(5, 3, 2, (8, 12), width=4)
    latent, labels = noise(6, 5), torch.arange(6) % 3
    code = torch.zeros(6, 3)
    code[range(6), labels] = 1
    first = latent @ net.from_latent.weight.T + net.from_latent.bias
    second = code @ net.from_label.weight.T + net.from_label.bias
    plain = UpsampleGenerator(5, 2, (8, 12), width=4)
    maps = torch.cat([first.view(6, 4, 2, 3), second.view(6, 4, 2, 3)], 1)
    plain.project = nn.Identity()
    plain.blocks.load_state_dict(net.blocks.state_dict())
    plain.head.load_state_dict(net.head.state_dict())
    mean, var = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), correction=0, keepdim=True)
    expected = plain((maps - mean) / (var + 1e-5).sqrt())
    found = net(latent, labels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found.mean((0, 2, 3)).abs().max() < 1e-3
    assert (found.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-3


def test_the_class_decides_on_the_image():
    net = ConditionalGenerator(5, 3, 1, 8, width=4).eval()
    latent = noise(1, 5).expand(3, 5)
    images = net(latent, torch.arange(3))
    assert min((images[i] - images[j]).abs().max() for i in range(3) for j in range(i)) > 1e-3


@pytest.mark.parametrize("size", [30, 2, (32, 31)])
def test_generator_a_refuses_sizes_that_are_no_multiples_of_4(size):
    with pytest.raises(ShapeError, match=r"got image size .*expected multiples of 4; resize to"):
        UpsampleGenerator(4, 1, size)


@pytest.mark.parametrize("size", [8, 24, 4, (32, 34), (40, 56)])
def test_generator_b_refuses_sizes_that_do_not_double_from_8(size):
    with pytest.raises(ShapeError, match=r"got image size .*expected a shorter side of 16, 32"):
        DCGANGenerator(4, 1, size)


def test_an_unknown_head_is_refused():
    with pytest.raises(RecipeError, match=r"'tanh', expected one of tanh_bn, sigmoid, bn"):
        UpsampleGenerator(4, 1, 8, head="tanh")


def test_the_large_generator_is_that_of_datafree():
    net = build(LargeGenerator, 20, 3, 16, width=4)
    weights, latent = iter(net.parameters()), noise(8, 20)
    values = F.linear(latent, next(weights), next(weights)).reshape(-1, 16, 4, 4)
    values = norm(values, next(weights), next(weights))
    for _ in range(2):
        values = values.repeat_interleave(2, 2).repeat_interleave(2, 3)
        values = F.conv2d(values, next(weights), padding=1)
        values = norm(values, next(weights), next(weights))
        values = torch.where(values > 0, values, 0.2 * values)
    values = torch.sigmoid(F.conv2d(values, next(weights), next(weights), padding=1))
    assert next(weights, None) is None
    torch.testing.assert_close(net(latent), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [UpsampleGenerator, LargeGenerator, PyramidGenerator])
def test_reinitialized_weights_are_drawn_as_dcgan_draws_them(kind):
    net = build(kind, 64, 3, 16, width=16)
    for part in net.modules():
        if getattr(part, "bias", None) is not None:
            part.bias.data.fill_(3.0)
    reinitialize(net, torch.Generator().manual_seed(0))
    for part in net.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            # 432 weights or more: the standard deviation is known to 3.4 %, 17 % is 5 sigma.
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.17)
            assert part.weight.mean().abs() < 0.005
        elif isinstance(part, nn.BatchNorm2d) and part.affine:
            # 16 weights or more: the mean is known to 0.005.
            assert part.weight.mean().item() == pytest.approx(1, abs=0.025)
            assert 0.005 < part.weight.std() < 0.04
        if getattr(part, "bias", None) is not None:
            assert not part.bias.any()


def test_running_statistics_survive_a_reinitialization():
    net = build(UpsampleGenerator, 6, 2, 8, width=4)
    net(noise(8, 6))
    before = {name: value.clone() for name, value in net.named_buffers()}
    assert before["project.2.running_mean"].any()
    reinitialize(net, torch.Generator().manual_seed(0))
    for name, value in net.named_buffers():
        assert torch.equal(value, before[name])


def test_the_generator_alone_decides_on_new_weights():
    def weights(seed: int, start: int) -> torch.Tensor:
        torch.manual_seed(start)
        net = UpsampleGenerator(6, 2, 8, width=4)
        held = list(net.parameters())
        before = torch.get_rng_state()
        reinitialize(net, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        # In place: an optimizer goes on with the same parameters.
        assert all(a is b for a, b in zip(held, net.parameters(), strict=True))
        return nn.utils.parameters_to_vector(held).detach()

    assert torch.equal(weights(1, start=0), weights(1, start=5))
    assert not torch.equal(weights(1, start=0), weights(2, start=0))


def test_without_a_generator_torchs_own_decides_on_new_weights():
    net = UpsampleGenerator(6, 2, 8, width=4)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        reinitialize(net)
        found.append(nn.utils.parameters_to_vector(net.parameters()).detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_weights_of_another_precision_are_drawn_alike():
    halves, singles = (build(LargeGenerator, 6, 2, 8, width=2) for _ in range(2))
    halves.half()
    for net in (halves, singles):
        reinitialize(net, torch.Generator().manual_seed(0))
    for half, single in zip(halves.parameters(), singles.parameters(), strict=True):
        assert half.dtype == torch.float16
        assert torch.equal(half, single.half())
