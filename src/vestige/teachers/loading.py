"""Teachers from names, factories and weight files."""

import difflib
import hashlib
import inspect
import json
import pickle
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from vestige.core.types import InputSpec
from vestige.errors import TeacherError
from vestige.models.factory import build_model

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
SCHEMES = ("builtin",)
KEYS = ("factory", "model", "args", "weights")
FORMS = (
    "'builtin:NAME', {'factory': 'package.module:callable', 'args': {...}, 'weights': 'FILE'} or "
    "{'model': NAME, 'args': {...}, 'weights': 'FILE'}"
)
TORCH_FILES = (".pt", ".pth")


class ImageInput(BaseModel):
    """The input spec of an image model, as it stands in recipes and cards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def spec(self) -> InputSpec:
        """The same as an InputSpec."""
        return InputSpec.image(self.channels, self.height, self.width, mean=self.mean, std=self.std)


class BuiltinCard(BaseModel):
    """What is known about a teacher whose weights lie beside the card.

    Attributes:
        name: as in "builtin:NAME".
        model: name in `models.factory`.
        args: its arguments.
        input: what one input looks like.
        num_classes: K, number of logits.
        classes: their names, in the order of the logits.
        data: name of the data set it was trained on (split "train").
        train_fingerprint: sha256 of the training images, see `data.image.ImageSet`.
        test_fingerprint: sha256 of the images that `accuracy` was measured on.
        recipe_sha256: of the recipe's values.
        weights_fingerprint: `fingerprint` of the trained module.
        parameters: number of weights.
        accuracy: on the test split, in [0, 1], measured once after training.
        torch: version that it was trained with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    model: str
    args: dict[str, Any]
    input: ImageInput
    num_classes: int = Field(ge=2)
    classes: tuple[str, ...]
    data: str
    train_fingerprint: str
    test_fingerprint: str
    recipe_sha256: str
    weights_fingerprint: str
    parameters: int
    accuracy: float = Field(ge=0, le=1)
    torch: str


def load_teacher(
    spec: str | Path | Mapping[str, Any],
    *,
    input_spec: InputSpec | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """Build a trained network.

    Args:
        spec: "builtin:NAME" (see `builtin_teachers`); or the path of a student.json that a run left
            beside its weights; or a mapping with "factory", a callable named
            "package.module:callable" that is called with "args"; or a mapping with "model", a name
            of `models.factory`. "weights" is a .safetensors file, or a .pt or .pth file that holds
            nothing but tensors; without it the network stays as it was built.
        input_spec: what one input looks like; needed for "model", checked for "builtin:".
        num_classes: number of logits; needed for "model", checked for "builtin:".

    Returns:
        The network in eval mode, on the CPU.

    Raises:
        TeacherError: the form, the file or its content is not as described here.
    """
    if str(spec).endswith(".json") and isinstance(spec, str | Path):
        return _load_by_card(Path(spec).expanduser())
    if isinstance(spec, Path):
        raise TeacherError(f"got the path {spec}, expected a student.json or one of {FORMS}")
    if isinstance(spec, str):
        return _load_by_name(spec, input_spec, num_classes)
    unknown = [key for key in spec if key not in KEYS]
    if unknown or ("factory" in spec) == ("model" in spec):
        near = difflib.get_close_matches(str(unknown[0]), KEYS, n=1) if unknown else []
        hint = f"did you mean '{near[0]}'?" if near else "give either 'factory' or 'model'"
        raise TeacherError(f"got a teacher with the keys {sorted(spec)}, expected {FORMS}; {hint}")
    args = dict(spec.get("args") or {})
    if "factory" in spec:
        module = _call(str(spec["factory"]), args)
    elif input_spec is None or num_classes is None:
        raise TeacherError(
            f"got model '{spec['model']}' without "
            f"{'an input spec' if input_spec is None else 'num_classes'}, expected both an input "
            "spec and num_classes; hand them to load_teacher"
        )
    else:
        module = build_model(str(spec["model"]), input_spec, num_classes, **args)
    if spec.get("weights") is not None:
        path = Path(spec["weights"]).expanduser()
        load_weights(module, read_weights(path), where=str(path))
    return module.eval()


def builtin_teachers() -> list[str]:
    """Names of the teachers whose weights come with the library."""
    return sorted(card.stem for card in WEIGHTS_FOLDER.glob("*.json"))


def builtin_card(name: str) -> BuiltinCard:
    """What is known about a built-in teacher.

    Raises:
        TeacherError: there is none of this name.
    """
    if name not in builtin_teachers():
        raise TeacherError(
            f"got built-in teacher '{name}', expected one of {', '.join(builtin_teachers())}; "
            f"other teachers are trained first, for example with `vestige train-teacher {name}`"
        )
    return read_card(WEIGHTS_FOLDER / f"{name}.json")


def read_card(path: Path) -> BuiltinCard:
    """Read a teacher's card.

    Raises:
        TeacherError: the file is missing or no card.
    """
    try:
        return BuiltinCard.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise TeacherError(
            f"got {path}, which cannot be read as the card of a teacher ({error}), expected the "
            "file that `vestige train-teacher` wrote; train the teacher again"
        ) from error


def load_from_card(card: BuiltinCard, weights: Path) -> nn.Module:
    """Build the network of `card` in eval mode and check its weights against the card.

    Raises:
        TeacherError: the weights are missing, damaged or not those that the card speaks of.
    """
    module = build_model(card.model, card.input.spec(), card.num_classes, **card.args)
    load_weights(module, read_weights(weights), where=str(weights))
    found = fingerprint(module)
    if found != card.weights_fingerprint:
        raise TeacherError(
            f"got weights with fingerprint {found[:12]} in {weights}, expected "
            f"{card.weights_fingerprint[:12]} as on the card; the file was changed, train the "
            "teacher again or install the library again"
        )
    return module.eval()


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

    Raises:
        TeacherError: they are not; the first five differences of each kind are listed.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
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


def fingerprint(module: nn.Module) -> str:
    """sha256 in hex over names, dtypes, shapes and bytes of a module's state, sorted by name.

    A wrapper adds a prefix to the names: for a WhiteBoxTeacher, take `fingerprint(teacher.module)`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load_by_card(path: Path) -> nn.Module:
    """The network of a student.json, whose weights lie in the same folder."""
    try:
        card = json.loads(path.read_text(encoding="utf8"))
        known = {key: card[key] for key in KEYS if key in card}
        weights = path.parent / str(card["weights"])
        given = dict(card["input"])
        shape = given.pop("shape", None) or [given.pop(k) for k in ("channels", "height", "width")]
        kind = str(given.pop("kind", "image"))
        spec = InputSpec(kind, tuple(shape), tuple(given["mean"]), tuple(given["std"]))
        count = int(card["num_classes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TeacherError(
            f"got {path}, which cannot be read as the card of a network ({error!r}), expected the "
            "student.json that a run left; name the mapping or the recipe instead"
        ) from error
    if not {"factory", "model"} & set(known):
        raise TeacherError(
            f"got {path} of a network that was handed in from Python, which the card cannot build; "
            "name its 'factory' in a mapping, with these weights"
        )
    return load_teacher({**known, "weights": weights}, input_spec=spec, num_classes=count)


def _load_by_name(name: str, input_spec: InputSpec | None, num_classes: int | None) -> nn.Module:
    scheme, colon, rest = name.partition(":")
    if not colon or scheme not in SCHEMES:
        raise TeacherError(
            f"got teacher '{name}', expected a name that starts with "
            f"{' or '.join(f'{known}:' for known in SCHEMES)} or a mapping; the forms are {FORMS}"
        )
    card = builtin_card(rest)
    asked = {"input spec": input_spec, "num_classes": num_classes}
    held = {"input spec": card.input.spec(), "num_classes": card.num_classes}
    for what, value in asked.items():
        if value is not None and value != held[what]:
            raise TeacherError(
                f"got {what} {value} for teacher '{name}', expected {held[what]} as it was "
                "trained; leave it out or use another teacher"
            )
    return load_from_card(card, WEIGHTS_FOLDER / f"{rest}.safetensors")


def _call(target: str, args: Mapping[str, Any]) -> nn.Module:
    module_name, _, attribute = target.partition(":")
    try:
        factory: Callable[..., Any] = getattr(import_module(module_name), attribute)
        inspect.signature(factory).bind(**args)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise TeacherError(
            f"got factory '{target}' with the arguments {sorted(args)}, which cannot be called "
            f"({error}), expected 'package.module:callable' and its arguments; install the package "
            "or correct the name"
        ) from error
    built = factory(**args)
    if not isinstance(built, nn.Module):
        raise TeacherError(
            f"got {type(built).__name__} from factory '{target}', expected a torch.nn.Module; "
            "return the network"
        )
    return built


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
