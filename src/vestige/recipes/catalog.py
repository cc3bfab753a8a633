"""The registries of methods and plug-ins, and the recipes that are shipped."""

import inspect
from pathlib import Path
from typing import Any

from vestige.core.registry import Registry
from vestige.core.types import Requires

METHODS = Registry(
    "vestige.methods",
    kind="method",
    group="vestige.methods",
    marks=("Config", "requires", "run", "parts", "result", "passes"),
)
PLUGINS = Registry(
    "vestige.plugins",
    kind="plugin",
    group="vestige.plugins",
    marks=("Config", "requires", "setup", "parts"),
)
TASKS = Registry(
    "vestige.tasks", kind="task", group="vestige.tasks", marks=("kind", "metric", "evaluate")
)
# By the kind of input, which is what a set is opened for.
DATA = Registry(
    "vestige.data", kind="input kind", group="vestige.data", marks=("open", "inputs", "examples")
)
FOLDER = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def about(path: Path) -> str:
    """First line of a recipe's header comment."""
    first = path.read_text(encoding="utf8").split("\n", 1)[0]
    return first.removeprefix("#").strip()


def listed_data() -> list[dict[str, Any]]:
    """Every set of every kind of input that says what there is: name, kind, where and splits."""
    found = []
    for kind in DATA.names():
        # A kind whose sets are made, or come from elsewhere, need not list them.
        listed = getattr(DATA.get(kind), "listed", list)
        found += [
            {"name": name, "kind": kind, "where": where, "splits": dict(splits)}
            for name, where, splits in listed()
        ]
    return found


def describe_methods() -> list[dict[str, Any]]:
    """What is known of each method, from its docstring and its requirements."""
    return [_describe(name) for name in METHODS.names()]


def _describe(name: str) -> dict[str, Any]:
    method = METHODS.get(name)
    text = inspect.getdoc(inspect.getmodule(method)) or ""
    paper = text.partition("Paper:")[2].partition("\n\n")[0]
    requires: Requires = method.requires
    needs = [f"source {source!r}" for source in requires.sources]
    needs += ["BatchNorm statistics"] if requires.batchnorm else []
    needs += [f"extra [{extra}]" for extra in requires.extras]
    return {
        "name": name,
        "summary": (inspect.getdoc(method) or "").split("\n", 1)[0],
        "paper": " ".join(paper.split()),
        "tasks": list(requires.tasks),
        "access": str(requires.access),
        "batchnorm": requires.batchnorm,
        "needs": needs,
    }
