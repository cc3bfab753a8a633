"""`vestige pool`."""

from pathlib import Path
from typing import Annotated

import typer

from vestige.cli.output import examples

app = typer.Typer(no_args_is_help=True, help="Look at pools of synthetic images.")


@app.callback()
def pools() -> None:
    """Look at pools of synthetic images."""


@app.command(
    epilog=examples(
        "vestige pool show runs/cmi-digits",
        "vestige pool show runs/cmi-digits/pool --picture sheet.png",
    )
)
def show(
    folder: Annotated[Path, typer.Argument(help="Of a pool, or of the run that left it.")],
    picture: Annotated[
        Path | None, typer.Option(help="Write a sheet of its images, one row per class.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="A teacher as in a recipe, which judges how the images differ."),
    ] = None,
) -> None:
    """Tell what a pool holds: images, classes, method, teacher, and how its images differ."""
    from rich.console import Console
    from rich.table import Table

    from vestige.sources.pool_files import open_pool, read_card
    from vestige.training.pictures import save_png
    from vestige.training.pools import pool_facts, pool_sheet

    card = read_card(folder)
    pool = open_pool(folder)
    diversity, judge = card.get("diversity"), "the teacher"
    if features is not None:
        from vestige.api import load_teacher

        network = load_teacher(features)
        diversity, judge = pool_facts(pool, network, 0).get("diversity"), features
    counts = card["labels"] or []
    table = Table(show_header=False)
    shape = " x ".join(map(str, card["input"]["shape"]))
    table.add_row("images", f"{len(pool):,} of {shape} in {card['batches']} batches")
    method = str(card.get("method", "unknown"))
    table.add_row("method", f"{method} with {card['variant']}" if card.get("variant") else method)
    if counts:
        present = [count for count in counts if count]
        table.add_row(
            "classes",
            f"{len(present)} of {len(card.get('classes') or counts)}, "
            f"{min(present):,} to {max(present):,} images each",
        )
    losses = [loss for loss in card.get("losses") or [] if loss is not None]
    if losses:
        table.add_row("loss of the batches", f"first {losses[0]:.3g}, last {losses[-1]:.3g}")
    if diversity:
        table.add_row(
            f"to {judge}",
            f"mean distance {diversity['pairwise_distance']:.3f}, "
            f"{diversity['effective_classes']:.1f} classes, "
            f"{diversity['repeats']:.1%} with a near repeat",
        )
    table.add_row("teacher", str(card.get("teacher_fingerprint", "unknown"))[:16])
    table.add_row("seed", str(card.get("seed", "unknown")))
    table.add_row("real data read", ", ".join(card.get("real_data") or []) or "none")
    table.add_row("folder", card["folder"])
    Console().print(table)
    if picture is not None:
        sheet = pool_sheet(pool, card.get("classes") or [])
        if sheet is None:
            from vestige.errors import ShapeError

            raise ShapeError(
                f"got images of shape {shape}, expected 1 or 3 channels to draw them; leave out "
                "--picture"
            )
        save_png(sheet, picture)
        typer.echo(f"wrote {picture}")
