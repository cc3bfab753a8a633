"""Weight files: read without ever running code from them."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vestige.errors import TeacherError

TORCH_FILES = (".pt", ".pth")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file, without ever running code from it.

    Raises:
        TeacherError: the file is missing, damaged, of an unknown kind, or holds code.
    """
    if path.suffix not in (".safetensors", *TORCH_FILES):
        raise TeacherError(
            f"got weights file {path}, expected .safetensors, .pt or .pth; save the state dict "
            "with safetensors.torch.save_file"
        )
    if not path.is_file():
        raise TeacherError(f"got no file {path}, expected weights there; correct the path")
    found: Any = _read_torch(path) if path.suffix in TORCH_FILES else _read_safetensors(path)
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise TeacherError(
            f"got {path} with {type(found).__name__} content, expected a state dict: tensors by "
            "name; save module.state_dict()"
        )
    return dict(found)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Copy `weights` into `module`; names and shapes must be the same.

    Buffers of any size (`core.protocols.SizedByState`) may have another one.

    Raises:
        TeacherError: they are not; the first five differences of each kind are listed.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    free = {
        f"{inner}.{name}" if inner else name
        for inner, one in module.named_modules()
        for name in getattr(one, "sized_by_state", ())
    }
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in weights and name not in free and weights[name].shape != expected[name].shape
    ]
    kinds = (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
    found = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in kinds
        if names
    ]
    if found:
        raise TeacherError(
            f"got weights in {where} that do not fit {type(module).__name__} ({'; '.join(found)}), "
            f"expected its {len(expected)} tensors; use the architecture and arguments that the "
            "weights were trained with"
        )
    module.load_state_dict(weights)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TeacherError(
            f"got {path}, which holds Python objects that run code when they are loaded, expected "
            "tensors only; refused. Where you trust the file, convert it once: safetensors.torch."
            "save_file(torch.load(FILE, weights_only=False).state_dict(), 'teacher.safetensors') "
            "(leave out .state_dict() if it holds a state dict)"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> TeacherError:
    return TeacherError(
        f"got {path}, which cannot be read ({type(error).__name__}: {error}), expected a whole "
        "weights file; copy or save it again"
    )
