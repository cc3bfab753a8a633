"""The registries of methods and plug-ins, and the recipes that are shipped."""

from pathlib import Path

from vestige.core.registry import Registry

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
FOLDER = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def about(path: Path) -> str:
    """First line of a recipe's header comment."""
    first = path.read_text(encoding="utf8").split("\n", 1)[0]
    return first.removeprefix("#").strip()
