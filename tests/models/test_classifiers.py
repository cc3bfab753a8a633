import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vestige.core.types import count_parameters
from vestige.errors import RecipeError, ShapeError
from vestige.models.classifiers import (
    BlockCNN,
    ConvNet,
    LeNet5,
    ResNet,
    StrideCNN,
    WideResNet,
    resnet18,
    resnet34,
    vgg11,
    wide_resnet,
)


def small() -> dict[str, nn.Module]:
    """One narrow network of each kind, 2 channels, 4 classes, 16x16."""
    torch.manual_seed(0)
    return {
        "lenet": LeNet5(4, 2, size=16),
        "convnet": ConvNet(2, 4, widths=(4, 6, 8)),
        "blocks": BlockCNN(2, 4, size=(16, 16), widths=(4, 6, 8), hidden=5, groups=2),
        "resnet": resnet18(channels=2, num_classes=4, width=4),
        "wrn": wide_resnet(10, 1, channels=2, num_classes=4),
        "vgg": vgg11(channels=2, num_classes=4),
    }


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def wrn_count(depth: int, factor: int) -> int:
    """Weights of WRN with projections only where shape changes, block by block."""
    total, before = 3 * 16 * 9, 16
    for group in range(3):
        after = 16 * factor * 2**group
        for index in range((depth - 4) // 6):
            total += 2 * before + 9 * before * after + 2 * after + 9 * after * after
            if (group and not index) or before != after:
                total += before * after
            before = after
    return total + 2 * before + 10 * before + 10


@pytest.mark.parametrize(
    ("net", "count"),
    [
        # By hand: 156 + 2416 + 48120 + 10164 + 850, and 78 + 608 + 12060 + 2562 + 430.
        (LeNet5(), 61_706),
        (LeNet5(half=True), 15_738),
        (ConvNet(1, 10), 24_058),
        (ConvNet(1, 10, widths=(6, 12, 24)), 3_628),
        # 960 + 18,624 + 37,056 for convolutions and GroupNorm, 524,416 + 1,290 behind.
        (BlockCNN(3, 10), 582_346),
        # The usual CIFAR ResNets.
        (resnet18(), 11_173_962),
        (resnet34(), 21_282_122),
        # Projection only where shape changes; with 16-1 that is not in the first group.
        (wide_resnet(40, 2), 2_243_546),
        (wide_resnet(16, 1), 175_066),
        (vgg11(), 9_231_114),
        # 2 * 2,752 scales and shifts fewer.
        (vgg11(bn=False), 9_231_114 - 5_504),
    ],
)
def test_networks_have_the_published_number_of_weights(net, count):
    assert count_parameters(net) == count


def test_wide_resnet_counts_follow_its_block_structure():
    for depth, factor in ((10, 1), (16, 2), (22, 3)):
        assert count_parameters(wide_resnet(depth, factor)) == wrn_count(depth, factor)


@pytest.mark.parametrize("name", list(small()))
def test_logits_are_a_linear_map_of_the_features_and_every_weight_learns(name):
    net = small()[name]
    values = inputs(6, 2, 16, 16)
    logits = net(values)
    assert logits.shape == (6, 4)
    net.zero_grad()
    F.cross_entropy(logits, torch.arange(6) % 4).backward()
    assert all(weight.grad is not None for weight in net.parameters())
    # A bias in front of a BN is the one weight that cannot matter.
    still = [key for key, weight in net.named_parameters() if not weight.grad.any()]
    assert not [key for key in still if not key.endswith("bias")]
    net.eval()
    features = net.features(values)
    assert features.dim() == 2
    assert (features >= 0).all()
    torch.testing.assert_close(
        net(values), features @ net.classifier.weight.T + net.classifier.bias, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", list(small()))
def test_samples_do_not_mix_in_evaluation_mode(name):
    net = small()[name].eval()
    values = inputs(5, 2, 16, 16)
    torch.testing.assert_close(net(values)[2:3], net(values[2:3]), rtol=1e-4, atol=1e-5)


def last_map(net: nn.Module, layer: nn.Module, side: int) -> tuple[int, ...]:
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad():
        net.eval()(torch.zeros(1, 2, side, side))
    handle.remove()
    return tuple(seen[0][2:])


@pytest.mark.parametrize(
    ("name", "body", "at_32", "at_16"),
    [
        ("convnet", "body", 4, 2),
        ("resnet", "stages", 4, 2),
        ("wrn", "groups", 8, 4),
        ("vgg", "body", 2, 1),
    ],
)
def test_maps_are_halved_as_in_the_variants_for_small_images(name, body, at_32, at_16):
    net = small()[name]
    assert last_map(net, getattr(net, body), 32) == (at_32, at_32)
    assert last_map(net, getattr(net, body), 16) == (at_16, at_16)


@pytest.mark.parametrize(("size", "kernel"), [(32, (5, 5)), (16, (1, 1)), ((28, 20), (4, 2))])
def test_lenet_closes_with_what_is_left_of_the_map(size, kernel):
    height, width = (size, size) if isinstance(size, int) else size
    net = LeNet5(3, 1, size=size, half=True)
    convolutions = [part for part in net.modules() if isinstance(part, nn.Conv2d)]
    assert convolutions[-1].kernel_size == kernel
    assert net(inputs(2, 1, height, width)).shape == (2, 3)


def test_lenet_is_that_of_the_paper():
    net = LeNet5().eval()
    weights = list(net.parameters())
    values = inputs(3, 1, 32, 32)
    expected = F.max_pool2d(F.relu(F.conv2d(values, *weights[0:2])), 2)
    expected = F.max_pool2d(F.relu(F.conv2d(expected, *weights[2:4])), 2)
    expected = F.relu(F.conv2d(expected, *weights[4:6])).flatten(1)
    expected = F.linear(F.relu(F.linear(expected, *weights[6:8])), *weights[8:10])
    torch.testing.assert_close(net(values), expected)


def slow_basic_block(values: torch.Tensor, block: nn.Module, stride: int) -> torch.Tensor:
    """A basic block in evaluation mode from its weights; a fresh BN divides by sqrt(1 + eps)."""
    scale = (1 + 1e-5) ** -0.5
    first, second = (part.weight for part in block.body if isinstance(part, nn.Conv2d))
    kept = values
    if stride == 2:
        kept = F.conv2d(values, block.shortcut[0].weight, stride=2) * scale
    values = F.relu(F.conv2d(values, first, stride=stride, padding=1) * scale)
    return F.relu(F.conv2d(values, second, padding=1) * scale + kept)


def test_resnet_is_that_of_the_paper():
    torch.manual_seed(0)
    net = ResNet((1, 2), channels=2, num_classes=3, width=4).eval()
    values = inputs(3, 2, 8, 8)
    expected = F.relu(F.conv2d(values, net.stem[0].weight, padding=1) * (1 + 1e-5) ** -0.5)
    for block, stride in zip(net.stages, (1, 2, 1), strict=True):
        expected = slow_basic_block(expected, block, stride)
    torch.testing.assert_close(net.features(values), expected.mean((2, 3)), rtol=1e-4, atol=1e-6)


def test_wide_resnet_adds_raw_inputs_unless_it_projects_activated_ones():
    torch.manual_seed(0)
    net = WideResNet(10, 1, channels=2, num_classes=3).eval()
    values = F.conv2d(inputs(3, 2, 8, 8), net.stem.weight, padding=1)
    scale = (1 + 1e-5) ** -0.5
    for block, stride in zip(net.groups[:3], (1, 2, 2), strict=True):
        active = F.relu(values * scale)
        first, second = (part.weight for part in block.body if isinstance(part, nn.Conv2d))
        inner = F.relu(F.conv2d(active, first, stride=stride, padding=1) * scale)
        kept = values if stride == 1 else F.conv2d(active, block.shortcut.weight, stride=2)
        values = F.conv2d(inner, second, padding=1) + kept
    expected = F.relu(values * scale).mean((2, 3))
    torch.testing.assert_close(net.features(inputs(3, 2, 8, 8)), expected, rtol=1e-4, atol=1e-6)


def test_width_scales_the_number_of_weights_with_its_square():
    quotient = count_parameters(resnet18(width=32)) / count_parameters(resnet18(width=16))
    assert quotient == pytest.approx(4, rel=0.02)


def test_sizes_and_depths_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"got image size 32x12, expected at least 16x16"):
        LeNet5(size=(32, 12))
    with pytest.raises(RecipeError, match=r"got a wide ResNet of depth 17 .*expected a depth of"):
        wide_resnet(17, 1)
    with pytest.raises(RecipeError, match="widen factor 0"):
        wide_resnet(16, 0)


@pytest.mark.parametrize(
    ("channels", "classes", "size", "args", "count"),
    [
        (1, 10, 28, {}, 26_434),
        (1, 26, 28, {}, 26_962),
        (3, 2, 84, {"widths": (16, 32, 64), "pool": True}, 25_954),
    ],
)
def test_a_stride_cnn_has_the_published_number_of_weights(channels, classes, size, args, count):
    assert count_parameters(StrideCNN(channels, classes, size=size, **args)) == count


@pytest.mark.parametrize(("size", "pool"), [((13, 10), False), ((20, 17), True)])
def test_nothing_lies_between_the_linear_layers_of_a_stride_cnn(size, pool):
    net = StrideCNN(2, 3, size=size, hidden_dim=5, pool=pool).eval()
    values = inputs(6, 2, *size)
    features = net.features(values)
    assert features.shape == (6, 5) and features.min() < 0
    torch.testing.assert_close(
        net(values), features @ net.classifier.weight.T + net.classifier.bias
    )


def test_a_stride_cnn_refuses_images_that_pooling_uses_up():
    with pytest.raises(ShapeError, match="nothing of the map"):
        StrideCNN(1, 3, size=4, pool=True)


def test_groups_of_channels_are_normalised_without_statistics():
    net = ConvNet(1, 10, widths=(32, 64, 64), norm="group")
    assert count_parameters(net) == 56_554
    assert not list(net.buffers())
    inputs = torch.randn(4, 1, 16, 16)
    together = net.train()(inputs)
    alone = torch.cat([net.eval()(one[None]) for one in inputs])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(RecipeError, match="'batch' or 'group'"):
        ConvNet(1, 10, norm="layer")
