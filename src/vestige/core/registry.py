"""Find methods and plug-ins by scanning a package; there is no central list."""

import difflib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from vestige.errors import ContractError, RecipeError


class Registry:
    """What a package offers, one class per module, plus entry points of other distributions.

    A module `pre_dfkd.py` offers the name `pre-dfkd`; a sub-package offers none. Names are listed
    without importing anything; a class is imported when it is asked for. A class that is offered
    nowhere goes by "package.module:Class".
    """

    def __init__(self, package: str, *, kind: str, group: str, marks: tuple[str, ...]) -> None:
        """Scan `package`.

        Args:
            package: dotted name of the package whose modules are scanned.
            kind: what the entries are called in messages.
            group: entry-point group of other distributions.
            marks: attributes that tell the class from its helpers.
        """
        self.kind = kind
        self._package = package
        self._group = group
        self._marks = marks

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self._modules(), *self._entry_points()})

    def get(self, name: str | type) -> Any:
        """The class that `name` stands for; a class stands for itself.

        Raises:
            RecipeError: there is none, or the class lacks something; names the nearest.
        """
        if isinstance(name, type):
            return self._complete(name, name.__qualname__)
        modules = self._modules()
        if name in modules:
            return self._class_in(importlib.import_module(modules[name]))
        if ":" in name:
            return self._imported(name)
        foreign = self._entry_points()
        if name in foreign:
            return self._load(foreign[name])
        known = self.names()
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        expected = f"expected one of {', '.join(known)}" if known else "but none is installed"
        raise RecipeError(
            f"got {self.kind} {name!r}, {expected}; {hint}See 'vestige list {self.kind}s'."
        )

    def name_of(self, name: str | type) -> str:
        """What stands in records: the name, or "package.module:Class" of a class."""
        if isinstance(name, str):
            return name
        return f"{name.__module__}:{name.__qualname__}"

    def _imported(self, target: str) -> Any:
        module, _, attribute = target.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise RecipeError(
                f"got {self.kind} {target!r}, which cannot be imported ({error}), expected "
                "'package.module:Class'; correct the name, or start where the module lies"
            ) from error
        return self._complete(found, target)

    def _complete(self, found: Any, target: str) -> Any:
        lacking = [mark for mark in self._marks if not hasattr(found, mark)]
        if lacking:
            raise RecipeError(
                f"got {self.kind} {target!r}, which lacks {', '.join(lacking)}, expected a class "
                f"with {', '.join(self._marks)}; add them"
            )
        return found

    def _load(self, point: Any) -> Any:
        try:
            found = point.load()
        except (ImportError, AttributeError) as error:
            raise ContractError(
                f"{self.kind} {point.name!r} is offered by another distribution and cannot be "
                f"loaded: {error}; update or uninstall it"
            ) from error
        lacking = [mark for mark in self._marks if not hasattr(found, mark)]
        if lacking:
            raise ContractError(
                f"{self.kind} {point.name!r} of another distribution lacks {', '.join(lacking)}; "
                "update or uninstall it"
            )
        return found

    def _modules(self) -> dict[str, str]:
        package = importlib.import_module(self._package)
        return {
            info.name.replace("_", "-"): f"{self._package}.{info.name}"
            for info in pkgutil.iter_modules(package.__path__)
            if not info.name.startswith("_") and not info.ispkg
        }

    def _entry_points(self) -> Mapping[str, Any]:
        return _offered(entry_points, self._group, tuple(sys.path))

    def _class_in(self, module: Any) -> Any:
        found = [
            value
            for value in vars(module).values()
            if inspect.isclass(value)
            and value.__module__ == module.__name__
            and all(hasattr(value, mark) for mark in self._marks)
        ]
        if len(found) != 1:
            raise ContractError(
                f"{module.__name__} holds {len(found)} classes with {', '.join(self._marks)}, "
                f"expected exactly one {self.kind}"
            )
        return found[0]


@lru_cache(maxsize=32)
def _offered(read: Callable[..., Any], group: str, where: tuple[str, ...]) -> Mapping[str, Any]:
    """Entry points by name; read once for the folders `where`, since each reading takes 10 ms."""
    return {point.name: point for point in read(group=group)}
