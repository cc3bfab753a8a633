"""`vestige bench`: evidence."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Measure what the project claims.")


@app.callback()
def bench() -> None:
    """Measure what the project claims."""


@app.command(epilog="Example: `vestige bench claims dfad --seeds 3`")
def claims(
    name: Annotated[str, typer.Argument(help="Name of a claim.")],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 to N - 1.")] = 3,
    arms: Annotated[str | None, typer.Option(help="Comma-separated subset of the arms.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/claims"),
    cells: Annotated[
        Path, typer.Option(help="Cache: one run folder per data set, arm and seed.")
    ] = Path("runs/claims"),
) -> None:
    """Run all arms of a claim over several seeds and write its JSON; goes on where it stopped."""
    from vestige.bench.claims import run_claim

    path = run_claim(
        name,
        seeds=range(seeds),
        arms=None if arms is None else tuple(arms.split(",")),
        out=out,
        cells=cells,
        echo=typer.echo,
    )
    typer.echo(path)


@app.command(epilog="Example: `vestige bench tables`")
def tables(
    root: Annotated[Path, typer.Option(help="Checkout of the project.")] = Path(),
) -> None:
    """Write the generated tables of README.md and benchmarks/CLAIMS.md."""
    from vestige.bench.tables import write_tables

    for path in write_tables(root):
        typer.echo(path)
