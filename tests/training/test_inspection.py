"""Wrong normalisations are told, right ones are not."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.core.types import InputSpec
from vestige.models.classifiers import ConvNet, LeNet5, ResNet, WideResNet
from vestige.tasks.classification import Classification
from vestige.teachers.loading import load_teacher
from vestige.training.inspection import (
    check_inputs,
    check_remembered,
    check_score,
    notices,
    remembered,
)


def pictures(channels: int, contrast: float = 0.25) -> Tensor:
    """Smooth images in [0, 1], whose neighbours go together as in photographs."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.randn(256, channels, 8, 8, generator=rng)
    shared = coarse.mean(1, keepdim=True) * 2 + 0.5 * coarse
    smooth = functional.interpolate(shared, size=32, mode="bilinear")
    smooth = smooth / smooth.std() * contrast + 0.45
    return smooth.clamp(0, 1)


class BatchNormFirst(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.level = nn.BatchNorm2d(channels)
        self.last = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.level(images).mean((2, 3)))


class Inside(nn.Module):
    """Normalises its own inputs, so that its first BatchNorm says nothing about them."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = ConvNet(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images - 0.45) / 0.25)


def taught(net: nn.Module, inputs: Tensor) -> nn.Module:
    """A network whose BatchNorms remember `inputs` exactly, as after an epoch of training."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        net.train()(inputs)
    return net.eval()


NETS = {
    "convnet": lambda c: ConvNet(c, 10),
    "resnet": lambda c: ResNet((1, 1), channels=c, width=16),
    "wide-resnet": lambda c: WideResNet(10, 1, channels=c),
    "batchnorm-first": BatchNormFirst,
}


@pytest.fixture(params=NETS)
def make(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    return NETS[request.param]


def specs(channels: int) -> tuple[InputSpec, InputSpec]:
    stats = {"mean": [0.45] * channels, "std": [0.25] * channels}
    return InputSpec.image(channels, 32, 32, **stats), InputSpec.image(channels, 32, 32)


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_and_deviation_of_the_training_inputs_are_found(make, channels):
    normalised, _ = specs(channels)
    inputs = normalised.normalize(pictures(channels))
    known = remembered(taught(make(channels), inputs), normalised)
    torch.testing.assert_close(
        known.mean, inputs.mean((0, 2, 3)).double(), atol=0.25, rtol=0, check_dtype=False
    )
    assert known.std == pytest.approx(float(inputs.std()), rel=0.3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("contrast", [0.15, 0.25, 0.35])
def test_only_the_wrong_normalisation_is_told(make, channels, contrast):
    normalised, raw = specs(channels)
    images = pictures(channels, contrast)
    good = taught(make(channels), normalised.normalize(images))
    plain = taught(make(channels), images)
    assert check_remembered(good, normalised) is None
    assert check_remembered(plain, raw) is None
    missing, superfluous = check_remembered(good, raw), check_remembered(plain, normalised)
    assert "has no mean and std" in missing.message
    assert "inputs in [0, 1]" in superfluous.message
    assert {missing.code, superfluous.code} == {"normalisation"}


def test_the_usual_half_and_half_is_right_for_dark_images_too(make):
    half = InputSpec.image(1, 32, 32, mean=[0.5], std=[0.5])
    dark = (pictures(1) - 0.35).clamp(0, 1)
    assert check_remembered(taught(make(1), half.normalize(dark)), half) is None
    assert check_remembered(taught(make(1), dark), half) is not None


def test_bytes_are_told(make):
    _, raw = specs(3)
    finding = check_remembered(taught(make(3), 255 * pictures(3)), raw)
    assert "bytes from 0 to 255" in finding.message
    assert "1/255" in finding.knob


def test_what_cannot_be_known_is_not_judged():
    normalised, raw = specs(1)
    inputs = pictures(1)
    silent = [
        LeNet5(10, 1),
        ConvNet(1, 10),  # never trained
        taught(Inside(1), inputs),
        taught(ConvNet(1, 10, widths=(2, 4)), inputs),
    ]
    for net in silent:
        assert remembered(net, raw) is None
        assert check_remembered(net, normalised) is None
    assert remembered(ConvNet(1, 10), InputSpec("embedding", (12,))) is None


def test_looking_leaves_the_network_as_it_was():
    _, raw = specs(1)
    net = taught(ConvNet(1, 10), pictures(1)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    remembered(net, raw)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_built_in_teacher_is_right_and_is_told_when_its_spec_is_not():
    from vestige.teachers.loading import builtin_card

    spec = builtin_card("digits-convnet").input.spec()
    net = load_teacher("builtin:digits-convnet")
    assert check_remembered(net, spec) is None
    other = (
        InputSpec("image", spec.shape)
        if spec.mean
        else InputSpec("image", spec.shape, (0.3,), (0.35,))
    )
    assert check_remembered(net, other).code == "normalisation"


def test_evaluation_inputs_must_lie_where_the_spec_puts_images():
    normalised, raw = specs(3)
    images = pictures(3)
    assert check_inputs(normalised.normalize(images), normalised) is None
    assert check_inputs(images, raw) is None
    assert "not normalised" in check_inputs(images, normalised).message
    assert "by the input spec they lie between 0 and 1" in (
        check_inputs(normalised.normalize(images), raw).message
    )
    assert check_inputs(255 * images, raw).code == "evaluation-inputs"
    assert check_inputs(255 * images, normalised) is not None


@pytest.mark.parametrize(
    ("score", "classes", "told"),
    [(0.11, 10, True), (0.35, 10, False), (0.55, 2, True), (0.7, 2, False), (0.02, 1000, False)],
)
def test_a_teacher_that_guesses_is_told(score, classes, told):
    assert (check_score(score, classes) is not None) is told


def test_all_are_told_together():
    normalised, raw = specs(3)
    net = taught(ConvNet(3, 10), normalised.normalize(pictures(3)))
    found = notices([net], Classification(raw, 10), normalised.normalize(pictures(3)), 0.1)
    assert [one.code for one in found] == ["normalisation", "evaluation-inputs", "teacher-score"]
    assert notices([net], Classification(normalised, 10), None, None) == []
