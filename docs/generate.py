"""Pages that are made from the code: methods, plug-ins, papers, recipe keys, commands."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from vestige.bench.tables import read_claims, results_table
from vestige.core.types import Requires
from vestige.recipes.catalog import METHODS, PLUGINS, describe_methods, shipped
from vestige.recipes.files import read_yaml

HEADS = ("Paper", "Differs from the paper", "Cost per round")


def write_pages(docs: Path) -> list[Path]:
    """Write everything below `docs/generated`; pages that are no longer made are removed."""
    claims = read_claims(docs.parent / "benchmarks" / "claims")
    pages = {
        "methods/index.md": methods_index(),
        **{f"methods/{name}.md": method_page(name, claims) for name in METHODS.names()},
        **{f"plugins/{name}.md": plugin_page(name) for name in PLUGINS.names()},
        "plugins/index.md": plugins_index(),
        "papers.md": papers(),
        "recipe-keys.md": recipe_keys(),
        "commands.md": commands(),
    }
    folder = docs / "generated"
    for old in folder.rglob("*.md"):
        if str(old.relative_to(folder)) not in pages:
            old.unlink()
    written = []
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # An unchanged page keeps its time, so that a second build is quick.
        if not path.is_file() or path.read_text(encoding="utf8") != text:
            path.write_text(text, encoding="utf8")
        written.append(path)
    return written


def methods_index() -> str:
    """A table of all methods, and their pages."""
    rows = ["| method | what it is | access | needs |", "| --- | --- | --- | --- |"]
    for method in describe_methods():
        needs = ", ".join(method["needs"]) or "nothing but the teacher"
        name = method["name"]
        rows.append(f"| [{name}]({name}.md) | {method['summary']} | {method['access']} | {needs} |")
    names = [f"{METHODS.get(name).__name__} <{name}>" for name in METHODS.names()]
    return _index("Methods", "\n".join(rows), names)


def plugins_index() -> str:
    """A table of all plug-ins, and their pages."""
    rows = [f"- [{name}]({name}.md)" for name in PLUGINS.names()]
    text = "\n".join(rows) or (
        "None is shipped yet. [Write your own](../../tutorials/own-plugin.md) and name it as "
        "`package.module:Class`."
    )
    names = [f"{PLUGINS.get(name).__name__} <{name}>" for name in PLUGINS.names()]
    return _index("Plug-ins", text, names)


def method_page(name: str, claims: dict[str, dict[str, Any]]) -> str:
    """One method: its paper, algorithm, settings, recipes and measured claims."""
    method = METHODS.get(name)
    parts = [_module_text(method), "## Needs", _needs(method.requires)]
    parts += ["## Settings", _settings(method.Config)]
    recipes = "\n\n".join(
        _recipe(recipe, path) for recipe, path in shipped().items() if _uses(path, name)
    )
    if recipes:
        parts += ["## Recipes", recipes]
    own = {key: result for key, result in claims.items() if result["method"] == name}
    for key, result in own.items():
        parts += [f"## Measured: {key}", _claim(result), results_table({key: result})]
    return "\n\n".join(parts) + "\n"


def plugin_page(name: str) -> str:
    """One plug-in: its paper and its settings."""
    plugin = PLUGINS.get(name)
    return "\n\n".join([_module_text(plugin), "## Settings", _settings(plugin.Config)]) + "\n"


def papers() -> str:
    """Each paper with the method and the command that runs it."""
    rows = ["| paper | method | command |", "| --- | --- | --- |"]
    for method in describe_methods():
        name = method["name"]
        recipes = [recipe for recipe, path in shipped().items() if _uses(path, name)]
        command = f"`vestige run {name if name in recipes else recipes[0]}`" if recipes else ""
        rows.append(f"| {method['paper']} | [{name}](methods/{name}.md) | {command} |")
    intro = "The systems that are here, by paper. What a method changes is told on its page."
    return "\n\n".join(["# Paper index", intro, "\n".join(rows)]) + "\n"


def recipe_keys() -> str:
    """Every key that a recipe may have, from the models that check it."""
    from vestige.federated.partition import PartitionConfig
    from vestige.federated.settings import FederationConfig
    from vestige.recipes import schema
    from vestige.training.trainer_config import TrainerConfig

    parts = ["# Keys of a recipe"]
    parts.append(
        "Made from the models that check a recipe. `config` holds the settings of the method, "
        "which are on [its page](methods/index.md)."
    )
    for title, model in {
        "The recipe": schema.Recipe,
        "input": schema.InputConfig,
        "student": schema.ModelConfig,
        "sources.NAME": schema.SourceConfig,
        "sources.NAME.parts.PART": schema.PartConfig,
        "plugins": schema.PluginConfig,
        "arms.NAME": schema.ArmConfig,
        "federation": FederationConfig,
        "sources.NAME.partition": PartitionConfig,
        "trainer": TrainerConfig,
    }.items():
        summary = (inspect.getdoc(model) or "").partition("\n")[0]
        heading = f"## {title}" if title == "The recipe" else f"## `{title}`"
        parts += [heading, _escaped(summary), _settings(model)]
    return "\n\n".join(parts) + "\n"


def commands() -> str:
    """Every command with its options, as `--help` tells them."""
    import typer
    from typer.main import get_command

    from vestige.cli.main import app

    root: Any = get_command(app)
    parts = ["# Commands", _escaped(root.help or "")]
    for name, command in _walk(root, "vestige"):
        parts += [f"## {name}", _escaped(" ".join((command.help or "").split()))]
        context = typer.Context(command, info_name=name)
        parts.append(f"```text\n{name} {' '.join(command.collect_usage_pieces(context))}\n```")
        rows = [
            f"| {_names(parameter)} | {_escaped(getattr(parameter, 'help', None) or '')} |"
            for parameter in command.get_params(context)
            if "--help" not in parameter.opts
        ]
        if rows:
            parts.append("\n".join(["| option | meaning |", "| --- | --- |", *rows]))
        if command.epilog:
            parts.append(command.epilog)
    return "\n\n".join(parts) + "\n"


def _walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    for key, inner in sorted(getattr(command, "commands", {}).items()):
        if getattr(inner, "commands", None):
            yield from _walk(inner, f"{name} {key}")
        elif not inner.hidden:
            yield f"{name} {key}", inner


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.human_readable_name}`"
    return ", ".join(f"`{name}`" for name in parameter.opts)


def _index(title: str, text: str, names: list[str]) -> str:
    tree = "\n".join(["```{toctree}", ":hidden:", "", *names, "```"]) if names else ""
    return f"# {title}\n\n{text}\n\n{tree}\n"


def _module_text(item: Any) -> str:
    """The module's docstring as Markdown: its first line is the title, its sections headings."""
    text = inspect.getdoc(inspect.getmodule(item)) or item.__name__
    title, _, body = text.partition("\n")
    blocks: list[str] = []
    for block in body.strip().split("\n\n"):
        head, colon, rest = block.partition(":")
        if colon and head in HEADS:
            content = inspect.cleandoc(rest.replace("\n    ", "\n").strip())
            blocks += [f"## {head}", _escaped(content)]
            # What follows the reference, up to the next heading, is the algorithm.
            blocks += ["## Algorithm"] if head == "Paper" else []
        else:
            blocks.append(_escaped(block))
    if blocks[-1:] == ["## Algorithm"]:
        blocks.pop()
    return "\n\n".join([f"# {title.rstrip('.')}", *blocks])


def _needs(requires: Requires) -> str:
    low, high = requires.teachers
    rows = {
        "tasks": ", ".join(requires.tasks),
        "access to the teacher": str(requires.access),
        "teachers": str(low) if low == high else f"{low} to {high}",
        "BatchNorm statistics": "needed" if requires.batchnorm else "not needed",
        "sources of inputs": ", ".join(
            [*requires.sources, *(f"{name} (optional)" for name in requires.optional_sources)]
        )
        or "none: no data of any kind",
        "extras": ", ".join(requires.extras) or "none",
        "closed to the plug-ins": ", ".join(requires.closed_to) or "none",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])


def _settings(model: type[BaseModel]) -> str:
    """A table of fields, defaults and what the class's docstring says of each."""
    told: dict[str, str] = {}
    # Settings may be told where they are inherited from, and told anew where they mean more.
    for kind in reversed(model.__mro__):
        told |= _attributes(inspect.cleandoc(kind.__dict__.get("__doc__") or ""))
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "must be given" if default is PydanticUndefined else f"`{_short(default)}`"
        rows.append(f"| `{name}` | {shown} | {_escaped(told.get(name, ''))} |")
    return "\n".join(rows)


def _short(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    text = "null" if value is None else str(value)
    return {"True": "true", "False": "false", "()": "[]"}.get(text, text)


def _attributes(text: str) -> dict[str, str]:
    """Name to text of a docstring's Attributes section, one line each."""
    section = text.partition("Attributes:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        match = re.match(r" {4}(\w+): (.*)", line)
        if match:
            name, found[match[1]] = match[1], match[2]
        elif name:
            found[name] += f" {line.strip()}"
    return found


def _uses(path: Path, method: str) -> bool:
    return read_yaml(path).get("method") == method


def _recipe(name: str, path: Path) -> str:
    lines = path.read_text(encoding="utf8").splitlines()
    header = [line.removeprefix("#").removeprefix(" ") for line in lines if line.startswith("#")]
    return f"### {name}\n\n```text\n" + "\n".join(header) + "\n```"


def _claim(result: dict[str, Any]) -> str:
    told = [result, *result["further_claims"]]
    return "\n".join(f"- **{claim['verdict']}**: {claim['claim']}" for claim in told)


def _escaped(text: str) -> str:
    """Plain text for Markdown: stars, bars, angles and underscores stay what they are.

    What stands between backticks is left alone.
    """
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(
        piece if piece.startswith("`") else re.sub(r"([*_<|\[\]])", r"\\\1", piece)
        for piece in pieces
    )
