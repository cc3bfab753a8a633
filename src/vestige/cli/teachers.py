"""`vestige train-teacher`."""

from pathlib import Path
from typing import Annotated

import typer

from vestige.cli.output import examples


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        name="train-teacher",
        epilog=examples(
            "vestige train-teacher digits-convnet --out teachers",
            "vestige train-teacher my-teacher.yaml",
            "vestige train-teacher bert-tiny --data ag_news",
            "vestige train-teacher cifar10-resnet34 --minutes 9 --resume",
        ),
    )(train_teacher)


def train_teacher(
    recipe: Annotated[str, typer.Argument(help="See vestige list teachers, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights and the card.")] = Path(
        "teachers"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last epoch that was finished.")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Stop before an epoch that would not end in this time."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Another set than the recipe's; its classes count.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N instead of the recipe's.")
    ] = None,
) -> None:
    """Train a documented teacher on real data; on a CPU the same recipe gives the same weights.

    Stopped by Ctrl-C or by --minutes it leaves with code 130, and --resume goes on.
    """
    from rich.progress import Progress

    from vestige.recipes.teacher import train_teacher as train
    from vestige.recipes.teacher_schema import load_teacher_recipe, on_other_data
    from vestige.training.report.tables import is_share, metric_name

    loaded = load_teacher_recipe(recipe)
    if data is not None:
        loaded = on_other_data(loaded, data)
    if device is not None:
        loaded = loaded.model_copy(update={"device": device})
    with Progress() as progress:
        task = progress.add_task(loaded.name, total=loaded.training.epochs)
        _, card = train(
            loaded,
            out,
            on_epoch=lambda epoch, loss: progress.update(task, completed=epoch),
            resume=resume,
            minutes=minutes,
        )
    metric, score = card.measured
    shown = f"{score:.1%}" if is_share(metric) else f"{score:.4g}"
    typer.echo(
        f"{out / loaded.name}.safetensors: test {metric_name(metric)} {shown}, {card.parameters} "
        f"parameters, fingerprint {card.weights_fingerprint[:12]}"
    )
