"""Commands that start runs, and those that look at recipes and run folders."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

RecipeArgument = Annotated[
    str, typer.Argument(help="A shipped recipe (vestige list recipes) or a YAML file.")
]
PresetOption = Annotated[
    str | None, typer.Option("--preset", help="A preset of the recipe; 'cpu' if there is one.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override, for example config.rounds=10. May be repeated."),
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="Wrap the method's updates; outermost first. May be repeated."),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Run folder; a new one below runs/ unless given.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Of all randomness.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in the folder where it stopped.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(epilog="Example: `vestige demo --seed 1 --out demo-1`")(demo)
    app.command(epilog="Example: `vestige run dfad --set config.bn_weight=2 --out runs/bn2`")(run)
    app.command(epilog="Example: `vestige show dfad --preset gpu`")(show)
    app.command(epilog="Example: `vestige validate my-recipe.yaml --set config.rounds=3`")(validate)
    app.command(epilog="Example: `vestige report runs/a runs/b --out comparison.html`")(report)


def demo(
    out: OutOption = None,
    seed: SeedOption = None,
    resume: ResumeOption = False,
    preset: Annotated[str | None, typer.Option(help="'cpu', or 'smoke' for a few seconds.")] = None,
    overrides: SetOption = None,
) -> None:
    """Distill a digit classifier without a single image, beside the arms it is judged against."""
    _start("demo", preset, overrides, None, out, seed, resume, arms=True)


def run(
    recipe: RecipeArgument,
    preset: PresetOption = None,
    overrides: SetOption = None,
    plugins: PluginOption = None,
    out: OutOption = None,
    seed: SeedOption = None,
    resume: ResumeOption = False,
    arms: Annotated[
        bool, typer.Option("--arms", help="Run all arms of the recipe and compare them.")
    ] = False,
) -> None:
    """Run a recipe."""
    _start(recipe, preset, overrides, plugins, out, seed, resume, arms=arms)


def show(recipe: RecipeArgument, preset: PresetOption = None, overrides: SetOption = None) -> None:
    """Print the resolved recipe, every default written out."""
    import yaml

    from vestige.recipes.schema import load_recipe

    loaded = load_recipe(recipe, preset=preset, overrides=overrides or ())
    values = loaded.model_dump(mode="json")
    values["config"] = loaded.method_config().model_dump(mode="json")
    typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)


def validate(
    recipe: RecipeArgument, preset: PresetOption = None, overrides: SetOption = None
) -> None:
    """Check a recipe and list all of its mistakes at once."""
    from vestige.recipes.schema import load_recipe

    load_recipe(recipe, preset=preset, overrides=overrides or ())
    typer.echo(f"{recipe} is valid")


def report(
    folders: Annotated[list[Path], typer.Argument(help="One run folder or several.")],
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Write one self-contained HTML page about one run, or one that compares several."""
    from vestige.errors import RecipeError
    from vestige.training.report import write_report

    for folder in folders:
        if not (folder / "recipe.yaml").is_file():
            raise RecipeError(f"{folder} is not a run folder: it holds no recipe.yaml")
    target = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    typer.echo(write_report(folders, target))


def _start(
    name: str,
    preset: str | None,
    overrides: list[str] | None,
    plugins: list[str] | None,
    out: Path | None,
    seed: int | None,
    resume: bool,
    *,
    arms: bool,
) -> None:
    from vestige.cli.progress import RunProgress
    from vestige.recipes.run import check_folder, run_arms, run_recipe
    from vestige.recipes.schema import load_recipe

    recipe = load_recipe(
        name, preset=preset, overrides=overrides or (), plugins=plugins or (), seed=seed
    )
    folder = out or _default_folder(f"{Path(name).stem}-seed{recipe.seed}", resume=resume)
    check_folder(folder, resume=resume)
    command = shlex.join(["vestige", *sys.argv[1:]])
    with RunProgress(list(recipe.arms) if arms else [recipe.method]) as progress:
        if arms:
            summary = run_arms(
                recipe, folder, resume=resume, callbacks=progress.callbacks, command=command
            )
        else:
            summary = run_recipe(
                recipe,
                folder,
                resume=resume,
                callbacks=progress.callbacks(recipe.method),
                command=command,
            )
    _print_result(summary, folder)


def _default_folder(stem: str, *, resume: bool) -> Path:
    """A new folder below runs/, or with `resume` the newest of that name."""
    taken = [path for number in range(1, 1000) if (path := _numbered(stem, number)).exists()]
    if resume and taken:
        return taken[-1]
    return next(path for number in range(1, 1001) if not (path := _numbered(stem, number)).exists())


def _numbered(stem: str, number: int) -> Path:
    return Path("runs") / (stem if number == 1 else f"{stem}-{number}")


def _print_result(summary: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.markup import escape

    from vestige.training.tables import arms_table, result_table

    console = Console()
    console.print(result_table(summary))
    if summary.get("arm_details"):
        console.print(arms_table(summary))
    for finding in summary["diagnosis"]:
        console.print(
            f"[yellow]{finding['code']}[/]: {escape(finding['message'])}. "
            f"Knob: {escape(finding['knob'])}"
        )
    pictures = "samples.png, " if (folder / "samples.png").is_file() else ""
    typer.echo(f"{folder}: {pictures}report.html, summary.json, student.safetensors")
