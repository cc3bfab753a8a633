"""A teacher that was opened, with what is known about it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

from vestige.core.types import InputSpec
from vestige.errors import TeacherError


@dataclass(frozen=True)
class OpenedTeacher:
    """A network with what its own configuration or card says.

    Attributes:
        module: a network in eval mode, on the CPU; or what writes texts and is no network.
        spec: what one input looks like; None where nobody said.
        num_classes: K, number of logits; None where nobody said.
        classes: their names in the order of the logits, or ().
        trained_on: what its card says of its data, or "".
        task: kind of task it answers; "" where nobody said.
        task_config: settings of the task.
    """

    module: Any
    spec: InputSpec | None
    num_classes: int | None
    classes: tuple[str, ...] = ()
    trained_on: str = ""
    task: str = ""
    task_config: Mapping[str, Any] = field(default_factory=dict)


def check_args(name: str, args: Sequence[str], refused: Sequence[str]) -> None:
    """Refuse arguments that would read a file past our own checks, or run foreign code.

    Raises:
        TeacherError: one of `args` is among `refused`.
    """
    found = sorted(set(args) & set(refused))
    if found:
        raise TeacherError(
            f"got the arguments {found} for teacher '{name}', expected none of "
            f"{', '.join(refused)}: files are given under 'weights' and no foreign code is run; "
            "leave them out"
        )


def check_asked(
    name: str, asked_spec: InputSpec | None, own_spec: InputSpec | None,
    asked_classes: int | None, own_classes: int | None,
) -> None:  # fmt: skip
    """Refuse channels or classes that are not the network's own; other image sizes are fine.

    Raises:
        TeacherError: they differ.
    """
    if None not in (asked_classes, own_classes) and asked_classes != own_classes:
        raise TeacherError(
            f"got num_classes {asked_classes} for teacher '{name}', expected {own_classes} as the "
            "network has; leave it out or use another teacher"
        )
    if asked_spec is None or own_spec is None:
        return
    same_kind = asked_spec.kind == own_spec.kind
    # Of texts and audio a network takes any length that its own card does not forbid.
    if same_kind and asked_spec.kind != "image":
        return
    if not same_kind or asked_spec.shape[0] != own_spec.shape[0]:
        raise TeacherError(
            f"got {asked_spec.kind} inputs of shape {asked_spec.shape} for teacher '{name}', "
            f"expected {own_spec.kind} inputs with {own_spec.shape[0]} channels; leave 'input' out"
        )


def read_input(given: Any) -> InputSpec:
    """An `input` as it stands in cards and recipes.

    Raises:
        TeacherError: it is none.
    """
    try:
        rest = dict(given)
        shape = rest.pop("shape", None) or [rest.pop(k) for k in ("channels", "height", "width")]
        kind = str(rest.pop("kind", "image"))
        mean, std = tuple(rest.pop("mean", ())), tuple(rest.pop("std", ()))
        rate = int(rest.pop("sample_rate_hz", None) or 0)
        # A resolved recipe writes those that were left out as null.
        if any(value is not None for value in rest.values()):
            raise ValueError(f"unknown keys {sorted(rest)}")
        return InputSpec(kind, tuple(map(int, shape)), mean, std, rate)
    except (KeyError, TypeError, ValueError) as error:
        raise TeacherError(
            f"got the input {given!r} ({error}), expected channels, height, width, mean and std, "
            "or kind and shape; correct it"
        ) from error


def call_any(target: str, args: Mapping[str, Any]) -> Any:
    """Whatever "package.module:callable" makes.

    Raises:
        TeacherError: it cannot be called with `args`.
    """
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
    return factory(**args)


def call_factory(target: str, args: Mapping[str, Any]) -> nn.Module:
    """The network that "package.module:callable" makes.

    Raises:
        TeacherError: it cannot be called with `args`, or makes no network.
    """
    built = call_any(target, args)
    if not isinstance(built, nn.Module):
        raise TeacherError(
            f"got {type(built).__name__} from factory '{target}', expected a torch.nn.Module; "
            "return the network"
        )
    return built
