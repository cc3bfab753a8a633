"""What several methods came to side by side, as a file that programs read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vestige.recipes.schema import Recipe
from vestige.training.files import write_json

COMPARISON = "comparison.json"


def write_comparison(
    out: Path, recipe: Recipe, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """comparison.json, schema 1: one row per arm, in the order in which they ran.

    Args:
        out: folder of the whole.
        recipe: whose arms were run.
        summary: of the whole, with the note on what the arms have in common.
        rows: see `arm_details`.
    """
    methods = {name: recipe.arm(name).method for name in recipe.arms}
    write_json(
        out / COMPARISON,
        {
            "schema": 1,
            "note": summary["note"],
            "task": summary["task"],
            "metric": summary["metric"],
            "seed": summary["seed"],
            "teacher": summary["teacher"],
            "headline": recipe.headline,
            "baseline": recipe.baseline,
            "reference": recipe.reference,
            "rows": [
                {**row, "method": methods[row["name"]], "samples": _sheet(out, row["name"])}
                for row in rows
            ],
        },
    )


def _sheet(out: Path, arm: str) -> str | None:
    """The arm's sheet of samples, relative to `out`; None without one."""
    path = Path("arms") / arm / "samples.png"
    return path.as_posix() if (out / path).is_file() else None
