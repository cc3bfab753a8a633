"""Teachers of timm, behind the extra [vision], and how its packages are imported."""

import logging
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vestige.core.types import InputSpec
from vestige.errors import MissingExtraError, TeacherError
from vestige.teachers.files import load_weights, read_weights
from vestige.teachers.opened import OpenedTeacher, check_args, check_asked

logger = logging.getLogger(__name__)

_REFUSED = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "features_only")
_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []


def import_timm() -> Any:
    """The package timm, beside a torch of any build.

    Raises:
        MissingExtraError: it is not installed.
    """
    return import_vision("timm", "timm")


def import_vision(package: str, scheme: str) -> Any:
    """A package that imports torchvision, beside a torch of any build.

    Args:
        package: its name.
        scheme: of the teachers that need it.

    Raises:
        MissingExtraError: it is not installed, or torchvision is not.
    """
    if missing := [name for name in (package, "torchvision") if find_spec(name) is None]:
        raise MissingExtraError(
            f"got a '{scheme}:' network, but {missing[0]} is not installed; "
            "pip install 'vestige[vision]'"
        )
    _declare_operators()
    return import_module(package)


def load_timm(
    name: str,
    *,
    args: Mapping[str, Any] | None = None,
    weights: Path | None = None,
    input_spec: InputSpec | None = None,
    num_classes: int | None = None,
) -> OpenedTeacher:
    """A classifier of timm in eval mode.

    Args:
        name: of `timm.list_models()`, with or without a tag; or "local-dir:FOLDER".
        args: of `timm.create_model`; `pretrained: false` leaves the weights as they were drawn.
        weights: a file for `read_weights` in place of the pretrained weights. Number of classes
            and channels are then taken from `num_classes` and `input_spec`, unless `args` say them.
        input_spec: in place of what the model's own configuration says; sizes and normalisation may
            differ from it, channels not.
        num_classes: must be the model's.

    Raises:
        MissingExtraError: timm is not installed.
        TeacherError: unknown name or arguments, weights that cannot be had or do not fit, another
            number of channels or classes.
    """
    timm = import_timm()
    given = dict(args or {})
    check_args(f"timm:{name}", list(given), _REFUSED)
    if weights is not None:
        given["pretrained"] = False
        if num_classes is not None:
            given.setdefault("num_classes", num_classes)
        if input_spec is not None:
            given.setdefault("in_chans", input_spec.shape[0])
    given.setdefault("pretrained", True)
    module = _create(timm, name, given)
    if weights is not None:
        load_weights(module, read_weights(weights), where=str(weights))
    count = int(getattr(module, "num_classes", 0))
    if count < 2:
        raise TeacherError(
            f"got teacher 'timm:{name}' with {count} classes, expected a classifier with at least "
            "2; set args.num_classes as the weights were trained"
        )
    own = _spec(module, given)
    check_asked(f"timm:{name}", input_spec, own, num_classes, count)
    if input_spec is not None and given["pretrained"] and _norm(input_spec) != _norm(own):
        logger.warning(
            "timm:%s was trained on inputs with mean %s and std %s, the recipe says %s and %s; "
            "leave 'input' out to take the model's own",
            *(name, own.mean, own.std, input_spec.mean, input_spec.std),
        )
    config = getattr(module, "pretrained_cfg", None) or {}
    tag = str(config.get("tag") or "")
    about = f"timm weights {config.get('architecture', name)}{'.' if tag else ''}{tag}"
    classes = tuple(map(str, config.get("label_names") or ()))
    return OpenedTeacher(
        module.eval(),
        input_spec or own,
        count,
        classes if len(classes) == count else (),
        about if given["pretrained"] else "",
    )


def _create(timm: Any, name: str, args: Mapping[str, Any]) -> nn.Module:
    local = name.startswith("local-dir:")
    known = name.partition(".")[0]
    remote = name.startswith(("hf_hub:", "hf-hub:"))
    if not local and not remote and not timm.is_model(known):
        near = timm.list_models(f"*{known[:5]}*")[:5]
        raise TeacherError(
            f"got teacher 'timm:{name}', expected a name of timm.list_models(); "
            f"{'near are ' + ', '.join(near) if near else 'see its documentation'}"
        )
    try:
        made: nn.Module = timm.create_model(name, **args)
    except (TypeError, KeyError) as error:
        raise TeacherError(
            f"got the arguments {dict(args)} for 'timm:{name}', which timm does not take "
            f"({error}); correct 'args'"
        ) from error
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        if not args["pretrained"]:
            raise TeacherError(
                f"got 'timm:{name}' with {dict(args)}, which timm cannot build: {error}"
            ) from error
        raise TeacherError(
            f"got no pretrained weights for 'timm:{name}' ({type(error).__name__}: {error}), "
            "expected to download them or to find them in the cache; where there is no network "
            "give a file: {timm: " + name + ", weights: FILE.safetensors}"
        ) from error
    return made


def _spec(module: nn.Module, args: Mapping[str, Any]) -> InputSpec:
    """What the model's own configuration says of its inputs."""
    config = getattr(module, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size") or (3, 224, 224)
    channels = int(args.get("in_chans", channels))
    size = args.get("img_size")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
    mean, std = (tuple(map(float, config.get(key) or ())) for key in ("mean", "std"))
    if mean and len(mean) != channels:
        # Grey or multispectral: the colour statistics say nothing about it, their mean is closest.
        mean = (sum(mean) / len(mean),) * channels
        std = (sum(std) / len(std),) * channels
    return InputSpec.image(channels, height, width, mean=mean, std=std)


def _norm(spec: InputSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return spec.mean, spec.std


def _declare_operators() -> None:
    """Let torchvision be imported where its compiled library cannot be loaded.

    The registry's torchvision is linked against CUDA libraries. Beside a CPU-only torch its library
    does not load, so its operators are never declared; it then registers fake kernels for two of
    them while it is imported, which raises. Declared here, they have no kernel, and no classifier
    calls them. Where the library loads it declares them itself, and twice is an error.
    """
    if _declared or "torchvision" in sys.modules or _library_loads():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        library.define(f"{name}{_SCHEMA}")
    # A library that is collected takes its declarations with it.
    _declared.append(library)


def _library_loads() -> bool:
    spec = find_spec("torchvision")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in Path(folder).glob("_C.*"):
            try:
                torch.ops.load_library(str(path))
            except OSError:
                return False
            return True
    return False
