"""Networks by the names that recipes and the command line use."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vestige.core.types import InputSpec
from vestige.errors import RecipeError, ShapeError
from vestige.models.classifiers import (
    BlockCNN,
    ConvNet,
    LeNet5,
    StrideCNN,
    resnet18,
    resnet34,
    vgg11,
    wide_resnet,
)
from vestige.models.generators import (
    ConditionalGenerator,
    DCGANGenerator,
    LargeGenerator,
    PyramidGenerator,
    UpsampleGenerator,
)
from vestige.models.language_models import SmallLanguageModel
from vestige.models.segmentation import EncoderDecoder, deeplabv3_mobilenetv2, deeplabv3_resnet50
from vestige.models.text import bert, transformer
from vestige.models.whisper import whisper
from vestige.models.word_models import BiLSTM, PairBiLSTM, TfidfLinear


@dataclass(frozen=True)
class _Entry:
    build: Callable[..., nn.Module]
    description: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    min_side: int = 1
    kind: str = "image"


_MODELS = {
    "lenet5": _Entry(LeNet5, "LeNet-5, no BatchNorm, 16x16 or larger", {"half": False}),
    "lenet5-half": _Entry(LeNet5, "LeNet-5 with half the channels", {"half": True}),
    "convnet": _Entry(ConvNet, "three strided convolutions with BatchNorm, 24k parameters"),
    "stride-cnn": _Entry(
        StrideCNN, "two strided convolutions and two linear layers, 26k parameters on 28x28"
    ),
    "block-cnn": _Entry(
        BlockCNN, "five blocks in a row with GroupNorm, 0.6M parameters at 32x32", min_side=4
    ),
    "resnet18": _Entry(resnet18, "ResNet-18 with the 32x32 stem, 11.2M parameters"),
    "resnet34": _Entry(resnet34, "ResNet-34 with the 32x32 stem, 21.3M parameters"),
    "wrn-40-2": _Entry(
        wide_resnet, "wide ResNet, 2.2M parameters", {"depth": 40, "widen_factor": 2}
    ),
    "wrn-16-1": _Entry(
        wide_resnet,
        "wide ResNet, 175k parameters; any wrn-D-K with D = 6n + 4 works",
        {"depth": 16, "widen_factor": 1},
    ),
    "vgg11": _Entry(vgg11, "VGG-11 with BatchNorm, 16x16 or larger, 9.2M parameters", min_side=16),
    "encoder-decoder": _Entry(
        EncoderDecoder, "segmentation: small U-shaped network with BatchNorm, 84k parameters"
    ),
    "deeplabv3-resnet50": _Entry(
        deeplabv3_resnet50, "segmentation: DeepLabV3 on dilated ResNet-50, 39.6M parameters"
    ),
    "deeplabv3-mobilenetv2": _Entry(
        deeplabv3_mobilenetv2, "segmentation: DeepLabV3 on dilated MobileNetV2, 5.1M parameters"
    ),
    "bert": _Entry(
        bert, "texts: BERT of any size with a vocabulary of its own, 0.4M parameters", kind="text"
    ),
    "transformer": _Entry(
        transformer, "texts: the classifier that a config of transformers describes", kind="text"
    ),
    "bilstm": _Entry(BiLSTM, "texts: LSTM in both directions, learns its words", kind="text"),
    "pair-bilstm": _Entry(
        PairBiLSTM, "pairs of texts: one LSTM for both, learns its words", kind="text"
    ),
    "tfidf-linear": _Entry(
        TfidfLinear, "texts: a linear layer on TF-IDF of words and their neighbours", kind="text"
    ),
    "language-model": _Entry(
        SmallLanguageModel, "texts: small GPT-2 that writes and judges by prompts", kind="text"
    ),
    "whisper": _Entry(
        whisper, "speech: Whisper of any size with tokens of its own, 0.3M parameters", kind="audio"
    ),
}
_GENERATORS = {
    "upsample": _Entry(UpsampleGenerator, "two upsamplings, sides divisible by 4"),
    "large": _Entry(LargeGenerator, "two upsamplings from a wider map, sides by 4"),
    "pyramid": _Entry(PyramidGenerator, "as many upsamplings as the size needs, any size"),
    "dcgan": _Entry(DCGANGenerator, "transposed convolutions, shorter side 16, 32, 64, 128, ..."),
}
# By itself: the others are called with noise alone.
_CONDITIONAL = _Entry(ConditionalGenerator, "two upsamplings from noise and a class")
_FROM_SPEC = ("channels", "size", "spec", "num_classes", "latent_dim")


def build_model(name: str, spec: InputSpec, num_classes: int, **args: Any) -> nn.Module:
    """A freshly initialised network; draws its weights from torch's global random state.

    Args:
        name: one of `list_models`, or "wrn-D-K" for any wide ResNet.
        spec: of one input; of images the shape is (C, H, W).
        num_classes: K, number of logits.
        **args: see `model_arguments`; checked, none is ignored.

    Returns:
        A module from inputs (B, C, H, W) to logits in training mode: (B, K), or (B, K, H, W) where
        the description says segmentation.

    Raises:
        RecipeError: unknown name or arguments, all of them listed with the nearest valid key.
        ShapeError: the input is no (C, H, W) or too small for the model.
    """
    return _build("model", name, _find_model(name), spec, {"num_classes": num_classes}, args)


def build_generator(
    name: str, spec: InputSpec, *, latent_dim: int, width: int, **args: Any
) -> nn.Module:
    """A freshly initialised generator; draws its weights from torch's global random state.

    Args:
        name: one of `list_generators`.
        spec: of one image that it makes; its shape is (C, H, W).
        latent_dim: Z, number of noise values per image.
        width: channels of the last hidden map; cost grows with its square.
        **args: see `generator_arguments`; checked, none is ignored.

    Returns:
        A module with the attribute `latent_dim`, from noise (B, Z) to (B, C, H, W). Whether that
        is an image or an input of the teacher depends on its head, see the class.

    Raises:
        RecipeError: unknown name or arguments, all of them listed with the nearest valid key.
        ShapeError: the input is no (C, H, W) or its size does not fit the generator.
    """
    given = {"latent_dim": latent_dim, "width": width}
    return _build("generator", name, _find_generator(name), spec, given, args)


def build_conditional_generator(
    spec: InputSpec, num_classes: int, *, latent_dim: int, width: int, **args: Any
) -> nn.Module:
    """A freshly initialised `ConditionalGenerator`, from torch's global random state.

    Args:
        spec: of one image that it makes; its shape is (C, H, W).
        num_classes: K.
        latent_dim: Z, number of noise values per image.
        width: channels of the last hidden map; cost grows with its square.
        **args: "head" or "slope"; checked, none is ignored.

    Returns:
        A module from noise (B, Z) and classes (B,) to (B, C, H, W).

    Raises:
        RecipeError: unknown arguments, all of them listed with the nearest valid key.
        ShapeError: the input is no (C, H, W) or its sides are not multiples of 4.
    """
    given = {"latent_dim": latent_dim, "width": width, "num_classes": num_classes}
    return _build("generator", "conditional", _CONDITIONAL, spec, given, args)


def list_models() -> list[tuple[str, str]]:
    """Names of the networks, each with one line on it."""
    return [(name, entry.description) for name, entry in _MODELS.items()]


def kind_of_model(name: str) -> str:
    """Kind of the inputs that this network reads: "image", "text" or "audio".

    Raises:
        RecipeError: unknown name.
    """
    return _find_model(name).kind


def list_generators() -> list[tuple[str, str]]:
    """Names of the generators, each with one line that describes it."""
    return [(name, entry.description) for name, entry in _GENERATORS.items()]


def model_arguments(name: str) -> tuple[str, ...]:
    """Keys that `build_model` takes for this network besides spec and number of classes.

    Raises:
        RecipeError: unknown name.
    """
    return _arguments(_find_model(name))


def generator_arguments(name: str) -> tuple[str, ...]:
    """Keys that `build_generator` takes for this generator besides spec and latent size.

    Raises:
        RecipeError: unknown name.
    """
    return _arguments(_find_generator(name))


def _find_model(name: str) -> _Entry:
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        depth, widen_factor = map(int, match.groups())
        return _Entry(wide_resnet, "wide ResNet", {"depth": depth, "widen_factor": widen_factor})
    if name not in _MODELS:
        raise RecipeError(_unknown("model", name, [*_MODELS, "wrn-D-K"]))
    return _MODELS[name]


def _find_generator(name: str) -> _Entry:
    if name not in _GENERATORS:
        raise RecipeError(_unknown("generator", name, _GENERATORS))
    return _GENERATORS[name]


def _build(
    kind: str,
    name: str,
    entry: _Entry,
    spec: InputSpec,
    given: Mapping[str, Any],
    args: Mapping[str, Any],
) -> nn.Module:
    valid = _arguments(entry)
    if wrong := [key for key in args if key not in valid]:
        raise RecipeError(
            "; ".join(_unknown(f"argument of {kind} {name!r}", key, valid) for key in wrong)
        )
    if entry.kind not in ("image", spec.kind):
        raise ShapeError(
            f"got {spec.kind} inputs for {kind} {name!r}, expected {entry.kind}; choose a {kind} "
            f"made for {spec.kind} inputs"
        )
    # What is made for images takes any (C, H, W), whatever the numbers mean.
    if entry.kind == "image" and len(spec.shape) != 3:
        raise ShapeError(
            f"got input shape {spec.shape} for {kind} {name!r}, expected (channels, height, "
            f"width); choose a {kind} made for {spec.kind} inputs"
        )
    if entry.kind == "image" and min(spec.shape[1:]) < entry.min_side:
        raise ShapeError(
            f"got input shape {spec.shape} for {kind} {name!r}, expected sides of at least "
            f"{entry.min_side}; resize the images or take 'convnet'"
        )
    sizes = {"channels": spec.shape[0], "size": spec.shape[1:], "spec": spec}
    given = {**given, **sizes, **entry.fixed, **args}
    taken = inspect.signature(entry.build).parameters
    try:
        return entry.build(**{key: value for key, value in given.items() if key in taken})
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RecipeError | ShapeError):
            raise
        raise RecipeError(
            f"got {dict(args)} for {kind} {name!r}, which cannot be built: {error}; leave them out "
            "or correct them"
        ) from error


def _arguments(entry: _Entry) -> tuple[str, ...]:
    taken = inspect.signature(entry.build).parameters
    return tuple(key for key in taken if key not in _FROM_SPEC and key not in entry.fixed)


def _unknown(what: str, key: str, valid: Iterable[str]) -> str:
    keys = list(valid)
    near = difflib.get_close_matches(key, keys, n=1)
    advice = f"did you mean {near[0]!r}?" if near else "take one of these"
    return f"got {what} {key!r}, expected one of: {', '.join(keys) or '(none)'}; {advice}"
