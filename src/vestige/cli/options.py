"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

_WHAT, _HOW, _WHERE = "What runs", "What is changed", "Where and how"

RecipeArgument = Annotated[
    str, typer.Argument(help="A shipped recipe (vestige list recipes) or a YAML file.")
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="A preset of the recipe; 'cpu' if there is one.",
        rich_help_panel=_HOW,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override, for example config.rounds=10. May be repeated; later ones win.",
        rich_help_panel=_HOW,
    ),
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="Wrap the method's updates; outermost first. May be repeated.",
        rich_help_panel=_HOW,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Of all randomness.", rich_help_panel=_HOW),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Run folder; a new one below runs/ unless given.", rich_help_panel=_WHERE
    ),
]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the run in the folder where it stopped.",
        rich_help_panel=_WHERE,
    ),
]
ArmsOption = Annotated[
    bool,
    typer.Option(
        "--arms", help="Run all arms of the recipe and compare them.", rich_help_panel=_WHAT
    ),
]
CompareOption = Annotated[
    str | None,
    typer.Option(
        "--compare",
        metavar="M1,M2,…",
        help=(
            "Run these methods instead, with the recipe's teacher, student, seed, data and budget: "
            "rounds, batch, the student's optimizer and number of updates. What else a method has "
            "is as the recipe has it for its own method, and as in the arm or the shipped recipe "
            "of any other; arms.METHOD.config.KEY in --set reaches one alone."
        ),
        rich_help_panel=_WHAT,
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Build everything, say how long it will take and where it will lie; run nothing.",
        rich_help_panel=_WHERE,
    ),
]
TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="NAME",
        help="Show the curves in a tracker, too; the same as trainer.track. May be repeated.",
        rich_help_panel=_WHERE,
    ),
]
