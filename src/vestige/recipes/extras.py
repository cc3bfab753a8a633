"""The packages behind the library's extras, and whether they are installed."""

import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

from packaging.requirements import Requirement

from vestige.errors import MissingExtraError, RecipeError


def packages_of(extra: str) -> list[Requirement]:
    """The requirements of the base, "", or of one extra."""
    found = []
    for line in requires("vestige") or []:
        needed = Requirement(line)
        if needed.marker is None:
            wanted = extra == ""
        elif "extra" in str(needed.marker):
            wanted = bool(extra) and needed.marker.evaluate({"extra": extra})
        else:
            wanted = extra == "" and needed.marker.evaluate()
        if wanted and not re.fullmatch("vestige", needed.name):
            found.append(needed)
    return found


def state_of(needed: Requirement) -> tuple[Literal["ok", "missing"], str]:
    """Whether a requirement is met, and what is installed, in words."""
    try:
        have = version(needed.name)
    except PackageNotFoundError:
        return "missing", "not installed"
    if not needed.specifier.contains(have, prereleases=True):
        return "missing", f"{have}, needs {needed.specifier}"
    return "ok", have


def check_extra(name: str, extra: str) -> None:
    """Refuse to go on without every package of one of the project's extras.

    Args:
        name: of the method or plug-in that needs it.
        extra: as named in the project's extras.

    Raises:
        MissingExtraError: a package is not installed.
        RecipeError: there is no such extra.
    """
    packages = packages_of(extra)
    for package in packages:
        try:
            version(package.name)
        except PackageNotFoundError as error:
            raise MissingExtraError(
                f"{name!r} needs {package.name}, which is not installed; "
                f"pip install 'vestige[{extra}]'"
            ) from error
    if not packages:
        raise RecipeError(f"{name!r} asks for the extra {extra!r}, which vestige does not have")


def lacking(name: str, extras: Iterable[str]) -> Iterator[str]:
    """What `check_extra` says of each extra that `name` needs and this machine does not have."""
    for extra in extras:
        try:
            check_extra(name, extra)
        except (MissingExtraError, RecipeError) as error:
            yield str(error)
