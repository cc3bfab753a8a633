import pytest
import torch
from torch import nn

from vestige.core.types import InputSpec, count_parameters
from vestige.errors import RecipeError, ShapeError
from vestige.models.factory import build_model
from vestige.models.probes import BatchNormProbe, batchnorm_layers, penultimate_layer
from vestige.models.segmentation import (
    DeepLabV3,
    EncoderDecoder,
    MobileNetV2Features,
    ResNet50Features,
    deeplabv3_mobilenetv2,
    deeplabv3_resnet50,
)

BACKBONES = {"resnet50": ResNet50Features, "mobilenetv2": MobileNetV2Features}
SMALL = ("encoder-decoder", "deeplabv3-resnet50", "deeplabv3-mobilenetv2")


def small(name: str, *, channels: int = 3, **args: object) -> nn.Module:
    """A narrow network with 5 classes whose BatchNorm statistics are neither 0 nor 1."""
    torch.manual_seed(0)
    given = {"widths": (4, 6, 8)} if name == "encoder-decoder" else {"width": 4}
    net = build_model(name, InputSpec.image(channels, 32, 32), 5, **{**given, **args})
    for layer in batchnorm_layers(net).values():
        layer.running_mean.normal_(0, 0.3)
        layer.running_var.uniform_(0.5, 1.5)
    return net


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def resnet50_count() -> int:
    """Weights of ResNet-50 without its classifier, block by block."""
    total, before = 3 * 64 * 49 + 2 * 64, 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(blocks):
            after = 4 * inner
            total += before * inner + 9 * inner * inner + inner * after + 4 * inner + 2 * after
            if index == 0:
                total += before * after + 2 * after
            before = after
    return total


def mobilenetv2_count() -> int:
    """Weights of MobileNetV2 up to its 320 channels, block by block."""
    total, before = 3 * 32 * 9 + 2 * 32, 32
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for expansion, after, blocks in stages:
        for _ in range(blocks):
            inner = before * expansion
            total += (before * inner + 2 * inner) * (expansion > 1)
            total += 9 * inner + 2 * inner + inner * after + 2 * after
            before = after
    return total


def head_count(before: int, classes: int, *, rates: int = 3, width: int = 256) -> int:
    """Weights of the head: pointwise and pooled branch, rates, projection, 3x3, classifier."""
    total = 2 * (before * width + 2 * width) + rates * (9 * before * width + 2 * width)
    total += (rates + 2) * width * width + 2 * width + 9 * width * width + 2 * width
    return total + width * classes + classes


def test_backbones_have_the_published_number_of_weights():
    # torchvision: 25,557,032 and 3,504,872 with 1000 classes; less what is left out here, the
    # classifiers and MobileNetV2's last convolution.
    resnet = 25_557_032 - (2048 * 1000 + 1000)
    mobilenet = 3_504_872 - (1280 * 1000 + 1000) - (320 * 1280 + 2 * 1280)
    assert count_parameters(ResNet50Features()) == resnet50_count() == resnet == 23_508_032
    assert count_parameters(MobileNetV2Features()) == mobilenetv2_count() == mobilenet == 1_811_712


def test_networks_have_the_number_of_weights_that_they_say():
    # Stem; two downs; two 1x1; two merges; classifier, by hand.
    hand = 464 + (4_672 + 9_280) + (18_560 + 36_992) + 2_112 + 544 + 9_280 + 2_336 + 85
    assert count_parameters(EncoderDecoder(3, 5)) == hand == 84_325
    assert count_parameters(EncoderDecoder(3, 5, widths=(8, 16, 32))) == 21_365
    resnet = count_parameters(deeplabv3_resnet50())
    # torchvision's 42,004,074 with 21 classes hold an auxiliary classifier, which nobody uses here.
    auxiliary = 9 * 1024 * 256 + 2 * 256 + 256 * 21 + 21
    assert resnet == 23_508_032 + head_count(2048, 21) == 42_004_074 - auxiliary == 39_638_869
    mobilenet = count_parameters(deeplabv3_mobilenetv2())
    assert mobilenet == 1_811_712 + head_count(320, 21) == 5_113_877
    one_rate = DeepLabV3(MobileNetV2Features(), 7, head_width=32, rates=(2,))
    assert count_parameters(one_rate) == 1_811_712 + head_count(320, 7, rates=1, width=32)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (5, 18), (1, 2)])
def test_logits_are_at_full_resolution(name: str, size: tuple[int, int]):
    net = small(name, channels=1).eval()
    with torch.no_grad():
        assert net(inputs(2, 1, *size)).shape == (2, 5, *size)


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_the_classifier_at_every_position_of_the_features(name: str):
    net = small(name).eval()
    values = inputs(2, 3, 33, 31)
    with torch.no_grad():
        features = net.features(values)
        at_features = torch.einsum("bfhw,kf->bkhw", features, net.classifier.weight[:, :, 0, 0])
        at_features += net.classifier.bias[:, None, None]
        logits = net(values)
    assert (features >= 0).all()
    assert penultimate_layer(net) == "classifier"
    expected = nn.functional.interpolate(at_features, size=(33, 31), mode="bilinear")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_every_weight_learns_and_the_gradient_reaches_every_pixel(name: str):
    net = small(name)
    values = inputs(4, 3, 33, 31).requires_grad_(True)
    labels = torch.randint(0, 5, (4, 33, 31), generator=torch.Generator().manual_seed(2))
    nn.functional.cross_entropy(net(values), labels).backward()
    still = [key for key, weight in net.named_parameters() if not weight.grad.any()]
    assert still == []
    # A stride of 2 alone would leave out pixels of which no tap reads; 3x3 taps read all of them.
    assert values.grad.ne(0).any(1).all()


@pytest.mark.parametrize("name", SMALL)
def test_every_convolution_but_the_classifier_is_followed_by_a_batchnorm(name: str):
    net = small(name)
    layers = batchnorm_layers(net)
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert len(layers) == len(convolutions) - 1
    assert [layer for layer in convolutions if layer.bias is not None] == [net.classifier]
    with torch.no_grad(), BatchNormProbe(net) as probe:
        net(inputs(2, 3, 32, 32))
    # All of them took part in the forward: the probe refuses to read where one did not.
    assert len(probe.observed()) == len(layers)


@pytest.mark.parametrize("name", SMALL)
def test_samples_do_not_mix_in_evaluation_mode(name: str):
    net = small(name).eval()
    values = inputs(3, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(net(values)[1:2], net(values[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(64, 96), (65, 50), (7, 130)])
def test_maps_of_a_backbone_are_as_small_as_its_output_stride_says(backbone, output_stride, size):
    net = backbone(width=2, output_stride=output_stride).eval()
    with torch.no_grad():
        maps = net(torch.zeros(1, 3, *size))
    # Rounded up at every halving, which is rounding up once.
    rounded = tuple(-(-side // output_stride) for side in size)
    assert maps.shape == (1, net.out_channels, *rounded)


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("size", [64, 75])
def test_dilated_maps_hold_the_maps_of_the_strided_network(backbone, output_stride, size):
    torch.manual_seed(0)
    strided = backbone(width=4, output_stride=32).eval()
    dilated = backbone(width=4, output_stride=output_stride).eval()
    dilated.load_state_dict(strided.state_dict())
    values = inputs(2, 3, size, size)
    step = 32 // output_stride
    with torch.no_grad():
        found = dilated(values)[:, :, ::step, ::step]
        torch.testing.assert_close(found, strided(values), rtol=1e-4, atol=1e-5)


def dilations(net: nn.Module) -> list[int]:
    """Of the 3x3 convolutions of stride 1 or more, in the order of definition."""
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    return [layer.dilation[0] for layer in layers if layer.kernel_size == (3, 3)]


def test_dilation_doubles_behind_every_stride_that_is_gone():
    # Blocks per stage 3, 4, 6, 3; the first block of a stage keeps the distance from before.
    assert dilations(ResNet50Features(width=2)) == [1] * 8 + [2] * 5 + [2] + [4] * 2
    assert dilations(ResNet50Features(width=2, output_stride=16)) == [1] * 14 + [2] * 2
    # Stem and blocks 1, 2, 3, 4, 3, 3, 1; strides go at the stages of 64 and 160 channels.
    mobile = dilations(MobileNetV2Features(width=2))
    assert mobile == [1] * 8 + [2] * 3 + [2] * 3 + [2] + [4] * 2 + [4]
    coarse = dilations(MobileNetV2Features(width=2, output_stride=16))
    assert coarse == [1] * 15 + [2] * 3


def reach(net: nn.Module, size: int, *, at: int) -> tuple[int, int]:
    """First and last column of the input that the output at one position depends on."""
    for layer in net.modules():
        # Weights of one sign, so that no two paths cancel and no ReLU hides one.
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
    values = torch.rand(1, 3, size, size).add(0.5).requires_grad_(True)
    net.double().eval()(values.double())[0, :, at, at].sum().backward()
    columns = values.grad[0].ne(0).any(0).any(0).nonzero().flatten()
    return int(columns[0]), int(columns[-1])


def test_an_encoder_decoder_sees_what_its_arithmetic_says():
    # Column 32, backwards. Full size: 3x3 reads 31 to 33. Half: that is 15 to 16, 3x3 reads 14 to
    # 17. Quarter: 7 to 8, 3x3 reads 6 to 9. Stride 2 reads half columns 11 to 19, 3x3 10 to 20,
    # stride 2 full columns 19 to 41, and the stem one more to each side.
    net = EncoderDecoder(3, 2, widths=(2, 2, 2))
    assert reach(net, 64, at=32) == (18, 42)


def test_pyramid_branches_sample_at_their_rates():
    net = DeepLabV3(MobileNetV2Features(width=4), 3, head_width=8, rates=(2, 5), dropout=0.0)
    maps = torch.zeros(1, 40, 21, 21)
    maps[..., 10, 10] = 1
    net.eval()
    # An impulse comes back where a tap was on it.
    for branch, rate in zip(net.branches, (0, 2, 5), strict=True):
        nn.init.ones_(branch[0].weight)
        with torch.no_grad():
            hit = branch(maps)[0, 0].nonzero()
        spots = sorted({(10 + y * rate, 10 + x * rate) for y in (-1, 0, 1) for x in (-1, 0, 1)})
        assert [tuple(spot) for spot in hit.tolist()] == spots


def test_the_pooled_branch_is_the_mean_at_every_position():
    net = small("deeplabv3-mobilenetv2").eval()
    maps = inputs(2, 40, 3, 5)
    with torch.no_grad():
        pooled = net.pooling(maps)
        alone = net.pooling(maps.mean((2, 3), keepdim=True))
    assert pooled.shape == (2, 32, 3, 5)
    torch.testing.assert_close(pooled, alone.expand(-1, -1, 3, 5))


@pytest.mark.parametrize("name", SMALL[1:])
def test_one_image_alone_cannot_be_trained_on(name: str):
    net = small(name)
    with pytest.raises(ShapeError, match=r"got one input in training mode, expected at least 2"):
        net(inputs(1, 3, 32, 32))
    assert net.eval()(inputs(1, 3, 32, 32)).shape == (1, 5, 32, 32)
    # The usual way to fine-tune: statistics frozen, everything else in training.
    frozen = small(name)
    for layer in batchnorm_layers(frozen).values():
        layer.eval()
    assert frozen(inputs(1, 3, 32, 32)).shape == (1, 5, 32, 32)


def test_dropout_is_at_one_place_and_as_asked():
    assert [layer.p for layer in dropouts(small("deeplabv3-resnet50"))] == [0.5]
    assert [layer.p for layer in dropouts(small("deeplabv3-resnet50", dropout=0.0))] == [0.0]
    assert dropouts(small("encoder-decoder")) == []
    net = small("deeplabv3-mobilenetv2", dropout=0.3)
    for layer in batchnorm_layers(net).values():
        layer.eval()
    values = inputs(2, 3, 32, 32)
    assert not torch.equal(net(values), net(values))
    net.eval()
    assert torch.equal(net(values), net(values))


def dropouts(net: nn.Module) -> list[nn.Dropout]:
    return [layer for layer in net.modules() if isinstance(layer, nn.Dropout)]


def test_widths_scale_every_channel():
    for width in (4, 8):
        resnet, mobilenet = ResNet50Features(width=width), MobileNetV2Features(width=width)
        assert (resnet.out_channels, mobilenet.out_channels) == (32 * width, 10 * width)
        assert deeplabv3_resnet50(width=width).classifier.in_channels == 4 * width
        assert deeplabv3_mobilenetv2(width=width).classifier.in_channels == 8 * width
    # The paper of DFAD: 2048 and 320 channels into a pyramid of 256.
    assert deeplabv3_resnet50(width=64).branches[0][0].weight.shape == (256, 2048, 1, 1)
    assert deeplabv3_mobilenetv2().branches[0][0].weight.shape == (256, 320, 1, 1)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("encoder-decoder", {"widths": ()}, r"got widths \[\]"),
        ("encoder-decoder", {"widths": (4, 0)}, r"got widths \[4, 0\]"),
        ("encoder-decoder", {"width": 4}, "'width', expected one of: widths; did you mean"),
        ("deeplabv3-resnet50", {"output_stride": 4}, "output_stride 4 for ResNet-50"),
        ("deeplabv3-mobilenetv2", {"output_stride": 12}, "12 for MobileNetV2, expected 8, 16 or"),
        ("deeplabv3-mobilenetv2", {"width": 0}, "width 0 for MobileNetV2, expected at least 1"),
        ("deeplabv3-resnet50", {"rates": ()}, r"got rates \[\]"),
        ("deeplabv3-resnet50", {"rates": (6, 0)}, r"got rates \[6, 0\]"),
        ("deeplabv3-resnet50", {"dropout": 1.5}, "got dropout 1.5"),
        ("deeplabv3-resnet50", {"dropuot": 0.5}, "did you mean 'dropout'"),
    ],
)
def test_arguments_are_checked(name: str, args: dict[str, object], message: str):
    given = args if name == "encoder-decoder" or "width" in args else {"width": 2, **args}
    with pytest.raises(RecipeError, match=message):
        build_model(name, InputSpec.image(3, 32, 32), 5, **given)


def test_an_encoder_decoder_of_one_width_is_two_layers():
    net = EncoderDecoder(3, 2, widths=[6])
    assert count_parameters(net) == 3 * 6 * 9 + 12 + 14
    assert net(inputs(2, 3, 9, 8)).shape == (2, 2, 9, 8)
