"""`vestige train-teacher`."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        name="train-teacher",
        epilog="Example: `vestige train-teacher digits-convnet --out teachers`",
    )(train_teacher)


def train_teacher(
    recipe: Annotated[str, typer.Argument(help="See vestige list teachers, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights and the card.")] = Path(
        "teachers"
    ),
) -> None:
    """Train a documented teacher on real data; the same recipe gives the same weights."""
    from rich.progress import Progress

    from vestige.recipes.teacher import load_teacher_recipe
    from vestige.recipes.teacher import train_teacher as train

    loaded = load_teacher_recipe(recipe)
    with Progress() as progress:
        task = progress.add_task(loaded.name, total=loaded.training.epochs)
        _, card = train(
            loaded, out, on_epoch=lambda epoch, loss: progress.update(task, completed=epoch)
        )
    typer.echo(
        f"{out / loaded.name}.safetensors: test accuracy {card.accuracy:.1%}, {card.parameters} "
        f"parameters, fingerprint {card.weights_fingerprint[:12]}"
    )
