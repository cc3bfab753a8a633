"""Teachers from names, factories and weight files."""

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from vestige.core.types import InputSpec
from vestige.errors import TeacherError
from vestige.models.factory import build_model
from vestige.teachers import hub, language_model, smp, vision
from vestige.teachers.cards import BuiltinCard, ImageInput
from vestige.teachers.ensemble import CombinedNetwork
from vestige.teachers.files import load_weights, read_weights
from vestige.teachers.opened import OpenedTeacher, call_factory, check_asked, read_input

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
SCHEMES = ("builtin", "timm", "smp", "hf")
KINDS = ("factory", "model", "timm", "smp", "hf", "ensemble", "lm", "endpoint")
KEYS = (
    *(*KINDS, "prompts", "args", "weights", "combine", "input", "num_classes"),
    *("task", "task_config"),
)
FORMS = (
    "'builtin:NAME', 'timm:NAME', 'smp:FOLDER', 'hf:ORG/NAME', 'hf:FOLDER', the path of a card "
    "(.json), {'factory': 'package.module:callable', 'args': {...}, 'weights': 'FILE'}, the same "
    "with 'model', 'timm', 'smp' or 'hf': NAME, "
    "{'ensemble': [TEACHER, ...], 'combine': 'probabilities'}, or one that writes texts: "
    "{'lm': FOLDER, 'prompts': TASK}, {'endpoint': URL, 'model': NAME, 'prompts': TASK} or "
    "{'factory': 'package.module:callable', 'prompts': TASK}"
)

Opener = Callable[[str], OpenedTeacher]

_FROM_PACKAGES: dict[str, Callable[..., OpenedTeacher]] = {
    "timm": vision.load_timm,
    "smp": smp.load_smp,
    "hf": hub.load_hub,
}

__all__ = [
    "FORMS",
    "KEYS",
    "KINDS",
    "SCHEMES",
    "WEIGHTS_FOLDER",
    "BuiltinCard",
    "ImageInput",
    "builtin_card",
    "builtin_teachers",
    "fingerprint",
    "load_from_card",
    "load_teacher",
    "of_card",
    "open_teacher",
    "read_card",
]


def load_teacher(
    spec: str | Path | Mapping[str, Any],
    *,
    input_spec: InputSpec | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """Build a trained network; `open_teacher` says the same and what is known about it.

    Args:
        spec: one of
            "builtin:NAME" (see `builtin_teachers`);
            "timm:NAME" with timm's pretrained weights, which are downloaded unless cached;
            "smp:FOLDER" or "smp:ORG/NAME", a network that segmentation-models-pytorch saved;
            "hf:ORG/NAME" or "hf:FOLDER", an image classifier of transformers;
            the path of a student.json or of a card of `vestige train-teacher`, beside its weights;
            a mapping with "factory", a callable named "package.module:callable" that is called with
            "args"; or with "model", a name of `models.factory`; or with "timm", "hf" or "smp" and a
            name, for "smp" also "ARCHITECTURE/ENCODER";
            a mapping with "ensemble", a list of teachers, and optionally "combine" and "weights",
            a number each, see `CombinedNetwork`;
            a mapping with "prompts" and "lm", "endpoint" or "factory", which writes texts, see
            `language_model.open_writer`.
            "weights" is a .safetensors file, or a .pt or .pth file that holds nothing but tensors.
            Without it timm, hf and a saved smp network take the pretrained weights, and others stay
            as they were built.
            "input" and "num_classes" in a mapping stand for the arguments below; "task" and
            "task_config" say what it was trained for, as in a recipe.
        input_spec: what one input looks like; needed for "model", checked where the teacher says it
            itself, where images may have another size.
        num_classes: number of logits; likewise.

    Returns:
        The network in eval mode, on the CPU.

    Raises:
        TeacherError: the form, the file or its content is not as described here.
        MissingExtraError: timm, segmentation-models-pytorch or transformers is not installed.
    """
    module: nn.Module = open_teacher(spec, input_spec=input_spec, num_classes=num_classes).module
    return module


def open_teacher(
    spec: str | Path | Mapping[str, Any],
    *,
    input_spec: InputSpec | None = None,
    num_classes: int | None = None,
    openers: Mapping[str, Opener] | None = None,
) -> OpenedTeacher:
    """Build a trained network and tell what its card or configuration says about it.

    Args:
        spec: as for `load_teacher`.
        input_spec: likewise.
        num_classes: likewise.
        openers: further schemes: each gets what stands behind "SCHEME:".

    Raises:
        TeacherError: as for `load_teacher`.
        MissingExtraError: likewise.
    """
    if isinstance(spec, Mapping):
        opened = _open_mapping(spec, input_spec, num_classes, openers or {})
        task, settings = spec.get("task") or opened.task, spec.get("task_config")
        return replace(opened, task=str(task), task_config=settings or opened.task_config)
    text = str(spec)
    if text.endswith(".json"):
        return _checked(text, _open_card(Path(text).expanduser()), input_spec, num_classes)
    if isinstance(spec, Path):
        raise TeacherError(f"got the path {spec}, expected a student.json or one of {FORMS}")
    scheme, colon, name = text.partition(":")
    if colon and scheme in (openers or {}):
        return _checked(text, (openers or {})[scheme](name), input_spec, num_classes)
    if colon and scheme == "builtin":
        card = builtin_card(name)
        found = of_card(card, load_from_card(card, WEIGHTS_FOLDER / f"{name}.safetensors"))
        return _checked(text, found, input_spec, num_classes)
    if colon and scheme in SCHEMES:
        return _open_mapping({scheme: name}, input_spec, num_classes, {})
    raise TeacherError(
        f"got teacher '{text}', expected a name that starts with "
        f"{' or '.join(f'{known}:' for known in (*SCHEMES, *(openers or {})))} or a mapping; the "
        f"forms are {FORMS}"
    )


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


def _open_mapping(
    spec: Mapping[str, Any],
    input_spec: InputSpec | None,
    num_classes: int | None,
    openers: Mapping[str, Opener],
) -> OpenedTeacher:
    kind = _kind(spec)
    args = dict(spec.get("args") or {})
    input_spec = read_input(spec["input"]) if spec.get("input") is not None else input_spec
    num_classes = spec["num_classes"] if spec.get("num_classes") is not None else num_classes
    if kind in language_model.KINDS or "prompts" in spec:
        return language_model.open_writer(spec, input_spec=input_spec, num_classes=num_classes)
    if kind == "ensemble":
        return _open_ensemble(spec, input_spec, num_classes, openers)
    weights = None if spec.get("weights") is None else Path(spec["weights"]).expanduser()
    if kind in _FROM_PACKAGES:
        return _FROM_PACKAGES[kind](
            str(spec[kind]),
            args=args,
            weights=weights,
            input_spec=input_spec,
            num_classes=num_classes,
        )
    if kind == "factory":
        module = call_factory(str(spec["factory"]), args)
    elif input_spec is None or num_classes is None:
        raise TeacherError(
            f"got model '{spec['model']}' without "
            f"{'an input spec' if input_spec is None else 'num_classes'}, expected both an input "
            "spec and num_classes; hand them to load_teacher"
        )
    else:
        module = build_model(str(spec["model"]), input_spec, num_classes, **args)
    if weights is not None:
        load_weights(module, read_weights(weights), where=str(weights))
    return OpenedTeacher(module.eval(), input_spec, num_classes)


def kinds_in(spec: Mapping[str, Any]) -> list[str]:
    """The keys of a mapping that say what kind of teacher it is; an endpoint's model is none."""
    return [one for one in KINDS if one in spec and not (one == "model" and "endpoint" in spec)]


def _kind(spec: Mapping[str, Any]) -> str:
    """The one key that says what kind of teacher a mapping describes, after all were checked."""
    unknown = [str(key) for key in spec if key not in KEYS]
    kinds = kinds_in(spec)
    refused = ("args", "prompts") if kinds == ["ensemble"] else ("combine",)
    if kinds and kinds[0] not in (*language_model.KINDS, "factory"):
        refused = (*refused, "prompts")
    useless = [key for key in refused if key in spec]
    if not unknown and len(kinds) == 1 and not useless:
        return kinds[0]
    near = difflib.get_close_matches(unknown[0], KEYS, n=1) if unknown else []
    hint = f"give either {' or '.join(map(repr, KINDS))}"
    if useless and len(kinds) == 1:
        hint = f"{kinds[0]!r} does not take {useless[0]!r}"
    if near:
        hint = f"did you mean '{near[0]}'?"
    raise TeacherError(
        f"got a teacher with the keys {sorted(map(str, spec))}, expected {FORMS}; {hint}"
    )


def _open_ensemble(
    spec: Mapping[str, Any],
    input_spec: InputSpec | None,
    num_classes: int | None,
    openers: Mapping[str, Opener],
) -> OpenedTeacher:
    listed, weights = spec["ensemble"], spec.get("weights")
    for what, value in (("ensemble", listed), ("weights", weights)):
        if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
            raise TeacherError(f"got {what} {value!r} of an ensemble, expected a list")
    members = [
        open_teacher(one, input_spec=input_spec, num_classes=num_classes, openers=openers)
        for one in listed
    ]
    for index, member in enumerate(members[1:], 1):
        for what, first, other in (
            ("inputs", members[0].spec, member.spec),
            ("number of classes", members[0].num_classes, member.num_classes),
            ("classes", members[0].classes, member.classes),
            ("task", members[0].task, member.task),
        ):
            if first and other and first != other:
                raise TeacherError(
                    f"got the {what} {other} of member {index} of an ensemble, expected {first} as "
                    "of member 0; take networks that see the same inputs and name the same classes"
                )
    network = CombinedNetwork(
        [member.module for member in members],
        combine=spec.get("combine") or "logits",
        weights=weights,
    )

    def known(values: Sequence[Any]) -> Any:
        return next((value for value in values if value), None)

    return OpenedTeacher(
        network.eval(),
        known([member.spec for member in members]),
        known([member.num_classes for member in members]),
        known([member.classes for member in members]) or (),
        "; ".join(dict.fromkeys(one.trained_on for one in members if one.trained_on)),
        known([member.task for member in members]) or "",
        known([member.task_config for member in members]) or {},
    )


def _open_card(path: Path) -> OpenedTeacher:
    """The network of a student.json, or of a trained teacher's card; weights lie beside it."""
    try:
        card = json.loads(path.read_text(encoding="utf8"))
        if "weights_fingerprint" in card:
            trained = read_card(path)
            return of_card(trained, load_from_card(trained, path.with_suffix(".safetensors")))
        known = {key: card[key] for key in ("factory", "model", "smp", "args") if key in card}
        weights = path.parent / str(card["weights"])
        spec, count = read_input(card["input"]), int(card["num_classes"])
        classes = tuple(map(str, card.get("classes") or ()))
        task, settings = str(card.get("task") or ""), dict(card.get("task_config") or {})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, TeacherError) and str(path) in str(error):
            raise
        raise TeacherError(
            f"got {path}, which cannot be read as the card of a network ({error!r}), expected the "
            "student.json that a run left; name the mapping or the recipe instead"
        ) from error
    if not {"factory", "model", "smp"} & set(known):
        raise TeacherError(
            f"got {path} of a network that was handed in from Python, which the card cannot build; "
            "name its 'factory' in a mapping, with these weights"
        )
    module = load_teacher({**known, "weights": weights}, input_spec=spec, num_classes=count)
    return OpenedTeacher(module, spec, count, classes, task=task, task_config=settings)


def of_card(card: BuiltinCard, module: nn.Module) -> OpenedTeacher:
    """The network with what its card says."""
    about = f"{card.data}/train, {card.train_fingerprint[:12]}"
    return OpenedTeacher(
        module,
        card.input.spec(),
        card.num_classes,
        card.classes,
        about,
        card.task,
        card.task_config,
    )


def _checked(
    name: str, found: OpenedTeacher, input_spec: InputSpec | None, num_classes: int | None
) -> OpenedTeacher:
    """What a card says stands: its weights are of one input and one number of classes."""
    check_asked(name, None, None, num_classes, found.num_classes)
    if input_spec is not None and input_spec != found.spec:
        raise TeacherError(
            f"got input spec {input_spec} for teacher '{name}', expected {found.spec} as it was "
            "trained; leave it out or use another teacher"
        )
    return found
