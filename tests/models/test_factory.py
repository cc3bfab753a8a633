from typing import Any

import pytest
import torch
from torch import nn

from vestige.core.protocols import LearnsVocabulary
from vestige.core.texts import to_bytes
from vestige.core.types import InputSpec, Prediction, count_parameters
from vestige.errors import RecipeError, ShapeError
from vestige.models.classifiers import LeNet5, wide_resnet
from vestige.models.factory import (
    build_conditional_generator,
    build_generator,
    build_model,
    generator_arguments,
    kind_of_model,
    list_generators,
    list_models,
    model_arguments,
)
from vestige.models.generators import DCGANGenerator, UpsampleGenerator

SPEC = InputSpec.image(2, 16, 20)
SPECS = {"image": SPEC, "text": InputSpec.text(40), "audio": InputSpec.audio(0.1, 8000)}
TEXTS = to_bytes(["the cat sat\x1fthe dog ran", "a dog ran far\x1fthe cat"], 40)
# What must be given; and small numbers, since only the wiring is of interest.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "bert": {"layers": 1, "width": 8, "heads": 2, "vocabulary": 300, "tokens": 12},
    "transformer": {
        "tokens": 12,
        "config": {
            "model_type": "bert",
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "vocab_size": 300,
        },
    },
    "language-model": {"prompts": "ag-news", "layers": 1, "width": 8, "heads": 2},
    "whisper": {"width": 8, "max_tokens": 5},
}
LISTED = [name for name, _ in list_models()]


def made(name: str) -> tuple[nn.Module, torch.Tensor, int]:
    """A small network of this name that knows the words it needs, two inputs, and K."""
    num_classes = 4 if name == "language-model" else 8
    args = ARGUMENTS.get(name, {"width": 4} if "width" in model_arguments(name) else {})
    spec = SPECS[kind_of_model(name)]
    if spec.kind == "audio" or name in ("bert", "transformer", "language-model"):
        pytest.importorskip("transformers")
    net = build_model(name, spec, num_classes, **args).eval()
    if isinstance(net, LearnsVocabulary):
        net.learn_vocabulary(TEXTS)
    inputs = TEXTS if spec.kind == "text" else torch.zeros(2, *spec.shape)
    return net, inputs, num_classes


@pytest.mark.parametrize("name", LISTED)
def test_every_listed_model_reads_the_spec(name):
    net, inputs, num_classes = made(name)
    with torch.no_grad():
        shape = tuple(Prediction.of(net(inputs)).logits.shape)
    described = dict(list_models())[name]
    if described.startswith("segmentation: "):
        assert shape == (2, num_classes, 16, 20)
    elif described.startswith("speech: "):
        # As many tokens as each recording says, at most five.
        assert (shape[0], shape[2]) == (2, num_classes) and shape[1] <= 5
    else:
        assert shape == (2, num_classes)


@pytest.mark.parametrize("name", LISTED)
def test_a_network_refuses_inputs_of_another_kind(name):
    kind = kind_of_model(name)
    for other in ("text", "audio"):
        if other == kind:
            continue
        with pytest.raises(ShapeError, match=f"choose a model made for {other} inputs"):
            build_model(name, SPECS[other], 8)


def test_a_description_says_what_a_network_reads():
    beginnings = {"texts": "text", "pairs of texts": "text", "speech": "audio"}
    for name, described in list_models():
        assert kind_of_model(name) == beginnings.get(described.split(":")[0], "image"), name
    assert kind_of_model("wrn-22-4") == "image"


@pytest.mark.parametrize("name", [name for name, _ in list_generators()])
def test_every_listed_generator_reads_the_spec(name):
    spec = InputSpec.image(2, 16, 24)
    net = build_generator(name, spec, latent_dim=5, width=4)
    assert net.latent_dim == 5
    assert net(torch.randn(3, 5)).shape == (3, 2, 16, 24)


def test_names_mean_the_networks_of_the_field():
    spec = InputSpec.image(1, 32, 32)
    assert isinstance(build_model("lenet5", spec, 10), LeNet5)
    assert count_parameters(build_model("lenet5", spec, 10)) == 61_706
    assert count_parameters(build_model("lenet5-half", spec, 10)) == 15_738
    colour = InputSpec.image(3, 32, 32)
    for depth, factor in ((40, 2), (16, 1), (10, 3)):
        found = build_model(f"wrn-{depth}-{factor}", colour, 10)
        assert count_parameters(found) == count_parameters(wide_resnet(depth, factor))
    upsample = build_generator("upsample", colour, latent_dim=4, width=2)
    assert isinstance(upsample, UpsampleGenerator)
    assert isinstance(build_generator("dcgan", colour, latent_dim=4, width=2), DCGANGenerator)


def test_every_description_is_one_line_and_every_name_once():
    listed = list_models() + list_generators()
    assert len({name for name, _ in listed}) == len(listed)
    assert all(text and "\n" not in text for _, text in listed)


def test_arguments_are_those_that_change_the_network():
    assert model_arguments("resnet18") == ("width",)
    assert model_arguments("convnet") == ("widths", "norm")
    assert model_arguments("vgg11") == ("bn",)
    assert model_arguments("lenet5-half") == ()
    assert model_arguments("wrn-22-4") == ()
    assert model_arguments("encoder-decoder") == ("widths",)
    deeplab = ("width", "output_stride", "rates", "dropout")
    assert model_arguments("deeplabv3-resnet50") == deeplab
    assert model_arguments("deeplabv3-mobilenetv2") == deeplab
    assert generator_arguments("upsample") == ("width", "head", "slope", "inner_eps", "spectral")
    wide = build_model("resnet18", SPEC, 3, width=8)
    assert count_parameters(wide) > count_parameters(build_model("resnet18", SPEC, 3, width=4))
    images = build_generator("upsample", SPEC, latent_dim=3, width=2, head="sigmoid")
    assert (images(torch.randn(4, 3)) >= 0).all()


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(
        RecipeError, match=r"got model 'resnet-18', expected .*did you mean 'resnet18'"
    ):
        build_model("resnet-18", SPEC, 3)
    with pytest.raises(RecipeError, match=r"got generator 'dcgn'.*did you mean 'dcgan'"):
        build_generator("dcgn", SPEC, latent_dim=3, width=2)
    with pytest.raises(RecipeError, match="lenet5, lenet5-half, convnet"):
        model_arguments("qqq")
    with pytest.raises(RecipeError, match="depth 41"):
        build_model("wrn-41-2", SPEC, 3)


def test_all_wrong_arguments_are_reported_at_once():
    with pytest.raises(RecipeError) as raised:
        build_model("resnet18", SPEC, 3, widht=8, channels=3)
    message = str(raised.value)
    assert "'widht', expected one of: width; did you mean 'width'?" in message
    assert "'channels'" in message
    with pytest.raises(RecipeError, match=r"'haed'.*did you mean 'head'"):
        build_generator("upsample", SPEC, latent_dim=3, width=2, haed="bn")
    with pytest.raises(RecipeError, match=r"'half', expected one of: \(none\)"):
        build_model("lenet5", SPEC, 3, half=True)


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"got input shape \(12,\) for model 'convnet'"):
        build_model("convnet", InputSpec("embedding", (12,)), 3)
    with pytest.raises(ShapeError, match="sides of at least 16"):
        build_model("vgg11", InputSpec.image(3, 32, 8), 3)
    with pytest.raises(ShapeError, match="expected multiples of 4"):
        build_generator("upsample", InputSpec.image(3, 30, 30), latent_dim=3, width=2)


def test_a_conditional_generator_takes_the_number_of_classes_and_shares_the_checks():
    net = build_conditional_generator(SPEC, 3, latent_dim=4, width=2, head="sigmoid")
    images = net(torch.randn(5, 4), torch.arange(5) % 3)
    assert images.shape == (5, *SPEC.shape)
    assert 0 <= images.min() <= images.max() <= 1
    with pytest.raises(RecipeError, match="did you mean 'head'"):
        build_conditional_generator(SPEC, 3, latent_dim=4, width=2, haed="bn")
    with pytest.raises(ShapeError, match="expected multiples of 4"):
        build_conditional_generator(InputSpec.image(1, 9, 9), 3, latent_dim=4, width=2)
