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


@app.command(epilog="Example: `vestige bench floor dfad`")
def floor(
    name: Annotated[str, typer.Argument(help="Name of a floor benchmark, or a YAML file.")],
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds of each case.")] = 5,
    cases: Annotated[str | None, typer.Option(help="Comma-separated subset of the cases.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's value; repeatable."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/floor"),
) -> None:
    """Time rounds against the passes that the algorithm cannot avoid, and write the JSON."""
    from vestige.bench.floor import run_floor

    path = run_floor(
        name,
        repeats=repeats,
        cases=None if cases is None else tuple(cases.split(",")),
        overrides=tuple(set_ or ()),
        out=out,
        echo=typer.echo,
    )
    typer.echo(path)


@app.command(epilog="Example: `vestige bench scale pool --images 100000`")
def scale(
    name: Annotated[str, typer.Argument(help="Name of a scale case: pool, foreign, federated.")],
    images: Annotated[
        int, typer.Option(min=1, help="The largest size; half, quarter and eighth come before.")
    ] = 100_000,
    clients: Annotated[int, typer.Option(min=1, help="The same for federated.")] = 1000,
    active: Annotated[
        int, typer.Option(min=1, help="Of federated, clients that are asked in a round.")
    ] = 50,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/scale"),
) -> None:
    """Measure a component as it grows: seconds, memory and disk at four sizes; write the JSON."""
    from vestige.bench.scale import run_scale, scale_table
    from vestige.training.files import read_json

    path = run_scale(name, images=images, clients=clients, active=active, out=out, echo=typer.echo)
    typer.echo(scale_table((read_json(path) or {})["sizes"]))
    typer.echo(path)


@app.command(epilog="Example: `vestige bench speed writing`")
def speed(
    name: Annotated[str, typer.Argument(help="Name of a speed case: crafting, writing.")],
    repeats: Annotated[int, typer.Option(min=1, help="Measured calls of each way.")] = 9,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/speed"),
) -> None:
    """Time our way beside a plain loop of the same calls in one process, and write the JSON."""
    from vestige.bench.speed import run_speed

    typer.echo(run_speed(name, repeats=repeats, out=out, echo=typer.echo))


@app.command(epilog="Example: `vestige bench tables`")
def tables(
    root: Annotated[Path, typer.Option(help="Checkout of the project.")] = Path(),
) -> None:
    """Write the generated tables of README.md and benchmarks/{CLAIMS,FLOOR,SCALE,SPEED}.md."""
    from vestige.bench.tables import write_tables

    for path in write_tables(root):
        typer.echo(path)
