"""`vestige doctor`: what works on this machine, what does not, and how to mend it."""

import json
from dataclasses import asdict
from itertools import groupby
from typing import Annotated

import typer

from vestige.cli.output import console, examples

_SIGNS = {"ok": "ok", "note": "note", "missing": "missing", "broken": "BROKEN"}
_STYLES = {"ok": "green", "note": "cyan", "missing": "yellow", "broken": "bold red"}


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        epilog=examples(
            "vestige doctor", "vestige doctor --imports", "vestige doctor --json > machine.json"
        )
    )(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    imports: Annotated[
        bool,
        typer.Option(
            "--imports", help="Also import every package of every extra, which takes a minute."
        ),
    ] = False,
) -> None:
    """Say what works on this machine, what does not, and the command that mends it.

    Leaves with 0 if the library itself works, whatever extras and data sets are missing, else 1.
    Neither the user nor the host is named, so the output can be shown to others.
    """
    from vestige.recipes.doctor import examine, works

    facts = examine(imports=imports)
    sound = works(facts)
    if as_json:
        typer.echo(
            json.dumps({"works": sound, "facts": [asdict(fact) for fact in facts]}, indent=2)
        )
        raise typer.Exit(0 if sound else 1)
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("to mend it", overflow="fold")
    for area, group in groupby(facts, key=lambda fact: fact.area):
        table.add_row(Text(area, style="bold"))
        for fact in group:
            table.add_row(
                Text(f"  {fact.name}"),
                Text(_SIGNS[fact.state], style=_STYLES[fact.state]),
                Text(fact.found),
                Text(fact.mend),
            )
    console().print(table)
    wrong = sum(fact.state == ("missing" if sound else "broken") for fact in facts)
    told = "vestige works here" if sound else "vestige does not work here"
    typer.echo(f"{told}; {'missing' if sound else 'broken'}: {wrong}")
    raise typer.Exit(0 if sound else 1)
