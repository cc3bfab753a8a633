"""Segmentation networks of segmentation-models-pytorch, behind the extra [vision]."""

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vestige.core.types import InputSpec
from vestige.errors import TeacherError
from vestige.teachers.files import load_weights, read_weights
from vestige.teachers.opened import OpenedTeacher, check_args, check_asked
from vestige.teachers.vision import import_vision

logger = logging.getLogger(__name__)

# Two answers instead of one, and answers that are no logits.
_REFUSED = ("aux_params", "activation", "strict")


def load_smp(
    name: str,
    *,
    args: Mapping[str, Any] | None = None,
    weights: Path | None = None,
    input_spec: InputSpec | None = None,
    num_classes: int | None = None,
) -> OpenedTeacher:
    """A trained segmentation network in eval mode.

    Args:
        name: "ARCHITECTURE" or "ARCHITECTURE/ENCODER", such as "Unet/resnet18", whose weights are
            yours; or what `save_pretrained` left: a folder, or "ORG/NAME" on the Hugging Face hub.
        args: of the architecture, with "encoder_name", or of `from_pretrained`.
        weights: a file for `read_weights`. Number of classes and channels of an architecture are
            then taken from `num_classes` and `input_spec`, unless `args` say them.
        input_spec: what one input looks like; nothing but the number of channels is known of a
            network of the package, so nothing else is checked.
        num_classes: must be the network's.

    Raises:
        MissingExtraError: the package is not installed.
        TeacherError: unknown name or arguments, an architecture without weights, weights that
            cannot be had or do not fit, another number of channels or classes, or an image size
            that the network does not take.
    """
    smp = import_vision("segmentation_models_pytorch", "smp")
    given = dict(args or {})
    check_args(f"smp:{name}", list(given), _REFUSED)
    is_saved = not _is_architecture(smp, name)
    if is_saved:
        module = _saved(smp, name, given)
    else:
        if weights is None and "encoder_weights" not in given:
            raise TeacherError(
                f"got teacher 'smp:{name}' without weights, expected a trained network: of an "
                "architecture the encoder alone can be downloaded; give {smp: "
                + f"{name}, weights: FILE.safetensors}}, or a folder that save_pretrained left"
            )
        module = _create(smp, name, given, input_spec, num_classes)
        if weights is None:
            logger.warning(
                "smp:%s is taken with a decoder as it was drawn, for 'args' name encoder_weights "
                "and no 'weights' are given; as a teacher it knows nothing",
                name,
            )
    if weights is not None:
        load_weights(module, read_weights(weights), where=str(weights))
    count = _check(name, module, input_spec, num_classes)
    is_remote = is_saved and weights is None and not Path(name).expanduser().is_dir()
    return OpenedTeacher(
        module.eval(),
        input_spec,
        count,
        trained_on=f"smp:{name}" if is_remote else "",
        task="segmentation",
    )


def fresh_smp(
    name: str, input_spec: InputSpec, num_classes: int, args: Mapping[str, Any] | None = None
) -> nn.Module:
    """A student in training mode; it draws its weights from torch's global random state.

    Args:
        name: "ARCHITECTURE" or "ARCHITECTURE/ENCODER".
        input_spec: of one input, with its number of channels.
        num_classes: K.
        args: of the architecture; `encoder_weights` is None unless it is among them.

    Raises:
        MissingExtraError: the package is not installed.
        TeacherError: unknown name or arguments, another number of channels or classes, or an image
            size that the network does not take.
    """
    smp = import_vision("segmentation_models_pytorch", "smp")
    given = dict(args or {})
    check_args(f"smp:{name}", list(given), _REFUSED)
    if not _is_architecture(smp, name):
        raise TeacherError(f"got student 'smp:{name}', expected {_architectures(smp)}")
    module = _create(smp, name, given, input_spec, num_classes)
    _check(name, module, input_spec, num_classes)
    return module.train()


def _is_architecture(smp: Any, name: str) -> bool:
    return name.partition("/")[0].lower() in smp.MODEL_ARCHITECTURES_MAPPING


def _architectures(smp: Any) -> str:
    known = sorted(kind.__name__ for kind in smp.MODEL_ARCHITECTURES_MAPPING.values())
    return f"one of {', '.join(known)}, with or without /ENCODER"


def _create(
    smp: Any,
    name: str,
    args: Mapping[str, Any],
    input_spec: InputSpec | None,
    num_classes: int | None,
) -> nn.Module:
    architecture, _, encoder = name.partition("/")
    given: dict[str, Any] = {"encoder_weights": None}
    if encoder:
        given["encoder_name"] = encoder
    if input_spec is not None:
        given["in_channels"] = input_spec.shape[0]
    if num_classes is not None:
        given["classes"] = num_classes
    given |= args
    taken = inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[architecture.lower()].__init__)
    valid = [key for key, one in taken.parameters.items() if one.kind is not one.VAR_KEYWORD][1:]
    # Only timm's encoders read further ones; with others the package drops them without a word.
    is_open = str(given.get("encoder_name", "")).startswith("tu-")
    if (unknown := [key for key in given if key not in valid]) and not is_open:
        raise TeacherError(
            f"got the arguments {unknown} for 'smp:{name}', expected some of {', '.join(valid)}; "
            "correct 'args'"
        )
    try:
        made: nn.Module = smp.create_model(architecture, **given)
    except (OSError, RuntimeError) as error:
        raise TeacherError(
            f"got no encoder weights {given['encoder_weights']!r} for 'smp:{name}' "
            f"({type(error).__name__}: {error}), expected to download them or to find them in the "
            "cache; where there is no network set args.encoder_weights: null"
        ) from error
    except (TypeError, KeyError, ValueError, AssertionError) as error:
        raise TeacherError(
            f"got the arguments {given} for 'smp:{name}', which the package does not take "
            f"({error}); correct 'args'"
        ) from error
    return made


def _saved(smp: Any, name: str, args: Mapping[str, Any]) -> nn.Module:
    folder = Path(name).expanduser()
    if not folder.is_dir() and name.count("/") != 1:
        raise TeacherError(
            f"got teacher 'smp:{name}', expected {_architectures(smp)}, a folder that "
            "save_pretrained left, or ORG/NAME on the hub; correct the name"
        )
    # An absolute path is never taken for a name on the hub. All weights are in what was saved: the
    # encoder's own would be downloaded only to be overwritten.
    where = str(folder.resolve()) if folder.is_dir() else name
    try:
        made: nn.Module = smp.from_pretrained(where, **{"encoder_weights": None, **args})
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TeacherError(
            f"got teacher 'smp:{name}', which cannot be loaded ({type(error).__name__}: {error}), "
            f"expected what save_pretrained left, or {_architectures(smp)}; where there is no "
            "network download the folder elsewhere and name it"
        ) from error
    return made


def _check(
    name: str, module: nn.Module, input_spec: InputSpec | None, num_classes: int | None
) -> int:
    """Number of classes, after what was asked for was compared with what the network is."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    head = [layer for layer in _head(module).modules() if isinstance(layer, nn.Conv2d)]
    channels, count = layers[0].in_channels, head[-1].out_channels
    own = None if input_spec is None else InputSpec.image(channels, *input_spec.shape[1:])
    check_asked(f"smp:{name}", input_spec, own, num_classes, count)
    if count < 2:
        raise TeacherError(
            f"got 'smp:{name}' with {count} class, expected at least 2 logits per pixel; set "
            "args.classes as the weights were trained"
        )
    if input_spec is not None:
        try:
            module.check_input_shape(torch.empty(1, *input_spec.shape, device="meta"))  # type: ignore[operator]
        except RuntimeError as error:
            raise TeacherError(
                f"got images of {input_spec.shape[1]}x{input_spec.shape[2]} for 'smp:{name}', "
                f"expected a size that it takes ({error}); set 'input', or take another "
                "architecture"
            ) from error
    return count


def _head(module: nn.Module) -> nn.Module:
    head: nn.Module = module.segmentation_head  # type: ignore[assignment]
    return head
