"""`vestige list`: what there is."""

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from vestige.cli.output import console, examples


class Kind(StrEnum):
    """What can be listed."""

    methods = "methods"
    models = "models"
    recipes = "recipes"
    data = "data"
    plugins = "plugins"
    teachers = "teachers"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        name="list",
        epilog=examples(
            "vestige list methods",
            "vestige list methods --without batchnorm",
            "vestige list recipes",
            "vestige list data --json",
        ),
    )(list_)


def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    without: Annotated[
        str | None,
        typer.Option(help="'batchnorm' leaves out methods that need BatchNorm statistics."),
    ] = None,
) -> None:
    """Show methods, models, recipes, data, plug-ins or teachers."""
    rows = _ROWS[kind]()
    if without is not None:
        if kind is not Kind.methods or without != "batchnorm":
            raise typer.BadParameter("--without batchnorm works on methods only")
        rows = [row for row in rows if not row["batchnorm"]]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        typer.echo(f"there are no {kind} yet")
        return
    out = console()
    if kind is Kind.methods:
        # As a table of eight columns nothing could be read on a usual terminal.
        for row in rows:
            out.print(f"[bold]{row['name']}[/]  {escape(row['summary'])}", highlight=False)
            for key in ("paper", "tasks", "access", "needs", "recipes"):
                shown = escape(_text(row[key])) or "-"
                out.print(f"  {key}: {shown}", highlight=False, soft_wrap=True)
        return
    table = Table(*rows[0], header_style="bold")
    for row in rows:
        table.add_row(*(escape(_text(value)) for value in row.values()))
    out.print(table)


def _methods() -> list[dict[str, Any]]:
    from vestige.recipes.catalog import describe_methods, shipped
    from vestige.recipes.files import read_yaml

    recipes: dict[str, list[str]] = {}
    for name in shipped():
        recipes.setdefault(str(read_yaml(name)["method"]), []).append(name)
    return [{**row, "recipes": recipes.get(row["name"], [])} for row in describe_methods()]


def _models() -> list[dict[str, Any]]:
    from vestige.models.factory import list_models

    return [{"name": name, "what": what} for name, what in list_models()]


def _recipes() -> list[dict[str, Any]]:
    from vestige.recipes.catalog import about, shipped
    from vestige.recipes.files import read_yaml

    return [
        {
            "name": name,
            "what": about(path),
            "presets": list(read_yaml(name).get("presets") or {}),
        }
        for name, path in shipped().items()
    ]


def _data() -> list[dict[str, Any]]:
    from vestige.recipes.catalog import listed_data

    return listed_data()


def _plugins() -> list[dict[str, Any]]:
    from vestige.recipes.catalog import PLUGINS

    return [
        {"name": name, "what": (PLUGINS.get(name).__doc__ or "").strip().split("\n", 1)[0]}
        for name in PLUGINS.names()
    ]


def _teachers() -> list[dict[str, Any]]:
    from vestige.recipes.teacher_schema import load_teacher_recipe, teacher_recipes
    from vestige.teachers.loading import builtin_card, builtin_teachers

    rows = []
    for name in teacher_recipes():
        shipped = name in builtin_teachers()
        metric, score = builtin_card(name).measured if shipped else (None, None)
        rows.append(
            {
                "name": f"builtin:{name}" if shipped else f"recipe:{name}",
                "task": load_teacher_recipe(name).task,
                "metric": metric,
                "score when trained": score,
                "rebuild": f"vestige train-teacher {name}",
            }
        )
    return rows


_ROWS = {
    Kind.methods: _methods,
    Kind.models: _models,
    Kind.recipes: _recipes,
    Kind.data: _data,
    Kind.plugins: _plugins,
    Kind.teachers: _teachers,
}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "" if value is None else str(value)
