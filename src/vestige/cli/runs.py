"""Commands that start runs or show what they left."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vestige.cli.options import (
    ArmsOption,
    CompareOption,
    DryRunOption,
    OutOption,
    PluginOption,
    PresetOption,
    ResumeOption,
    SeedOption,
    SetOption,
    TrackOption,
)
from vestige.cli.output import console, examples

if TYPE_CHECKING:
    from vestige.cli.progress import RunProgress
    from vestige.recipes.build import Job
    from vestige.recipes.schema import Recipe

# A run that is over sooner needs no estimate.
_WORTH_TELLING_MINUTES = 1.0
# What --compare takes teacher, student and budget from unless a recipe is named.
_ALL = "all-methods"


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(
        epilog=examples(
            "vestige demo",
            "vestige demo --seed 1 --out demo-1",
            "vestige demo --preset smoke",
        )
    )(demo)
    app.command(
        epilog=examples(
            "vestige run dfad",
            "vestige run dfad --set config.bn_weight=2 --seed 1 --out runs/bn2",
            "vestige run my-recipe.yaml --dry-run",
            "vestige run my-recipe.yaml --out runs/mine --resume",
            "vestige run dfad-remedies --arms",
            "vestige run --compare dfad,cmi,fast",
            "vestige run --compare dfad,kd demo --set trainer.minutes=5",
        )
    )(run)
    app.command(
        epilog=examples(
            "vestige report runs/dfad-seed0",
            "vestige report runs/a runs/b --out comparison.html",
        )
    )(report)


@dataclass(frozen=True)
class _Request:
    """What a run was asked for."""

    recipe: str
    preset: str | None
    overrides: Sequence[str]
    plugins: Sequence[str] = ()
    out: Path | None = None
    seed: int | None = None
    resume: bool = False
    arms: bool = False
    compare: str | None = None
    dry_run: bool = False


def demo(
    out: OutOption = None,
    seed: SeedOption = None,
    resume: ResumeOption = False,
    preset: Annotated[str | None, typer.Option(help="'cpu', or 'smoke' for a few seconds.")] = None,
    overrides: SetOption = None,
) -> None:
    """Distill a digit classifier without a single image, beside the arms it is judged against."""
    _start(_Request("demo", preset, overrides or (), out=out, seed=seed, resume=resume, arms=True))


def run(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A shipped recipe (vestige list recipes) or a YAML file; 'all-methods' for "
            "--compare alone."
        ),
    ] = None,
    arms: ArmsOption = False,
    compare: CompareOption = None,
    preset: PresetOption = None,
    overrides: SetOption = None,
    plugins: PluginOption = None,
    out: OutOption = None,
    seed: SeedOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    track: TrackOption = None,
) -> None:
    """Run a recipe: its main run, all of its arms, or several methods side by side."""
    if arms and compare is not None:
        raise typer.BadParameter("--arms and --compare ask for different runs; leave one out")
    if recipe is None and compare is None:
        raise typer.BadParameter(
            "got none, expected one of vestige list recipes or a YAML file", param_hint="RECIPE"
        )
    tracked = [f"trainer.track=[{', '.join(track)}]"] if track else []
    _start(
        _Request(
            recipe or _ALL,
            preset,
            [*(overrides or ()), *tracked],
            plugins or (),
            out,
            seed,
            resume,
            arms,
            compare,
            dry_run,
        )
    )


def report(
    folders: Annotated[list[Path], typer.Argument(help="One run folder or several.")],
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Write one self-contained HTML page about one run, or one that compares several."""
    from vestige.errors import RecipeError
    from vestige.training.report import write_report

    for folder in folders:
        if not (folder / "recipe.yaml").is_file():
            raise RecipeError(
                f"{folder} is not a run folder: it holds no recipe.yaml; name a folder that "
                "'vestige run' wrote"
            )
    target = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    typer.echo(write_report(folders, target))


def _start(request: _Request) -> None:
    from vestige.training import runtime

    recipe, note = _resolve(request)
    with runtime.processes(recipe.trainer.device):
        _run(request, recipe, note)


def _run(request: _Request, recipe: "Recipe", note: str) -> None:
    from vestige.cli.progress import RunProgress
    from vestige.core import parallel
    from vestige.recipes.arms import run_arms
    from vestige.recipes.run import check_folder, run_recipe

    stem = f"{Path(request.recipe).stem}{'-compared' if request.compare else ''}-seed{recipe.seed}"

    def choose() -> Path:
        folder = request.out or _default_folder(stem, resume=request.resume)
        check_folder(folder, resume=request.resume)
        return folder

    folder = parallel.first(choose)
    gathers = request.arms or request.compare is not None
    if request.dry_run:
        _preview(recipe, folder, gathers=gathers, note=note)
        return
    command = shlex.join(["vestige", *sys.argv[1:]])
    with RunProgress(list(recipe.arms) if gathers else [recipe.method]) as progress:

        def built(job: "Job") -> None:
            _tell_estimate(job, progress, named=gathers)

        if gathers:
            summary = run_arms(
                recipe,
                folder,
                resume=request.resume,
                callbacks=progress.callbacks,
                command=command,
                note=note,
                built=built,
            )
        else:
            summary = run_recipe(
                recipe,
                folder,
                resume=request.resume,
                callbacks=progress.callbacks(recipe.method),
                command=command,
                built=built,
            )
    _print_result(summary, folder)


def _resolve(request: _Request) -> "tuple[Recipe, str]":
    """The recipe that is to run, and what its arms have in common."""
    from vestige.recipes.compare import compare
    from vestige.recipes.loading import load_recipe

    if request.compare is None:
        recipe = load_recipe(
            request.recipe,
            preset=request.preset,
            overrides=request.overrides,
            plugins=request.plugins,
            seed=request.seed,
        )
        return recipe, ""
    found = compare(
        request.compare.split(","),
        request.recipe,
        preset=request.preset,
        overrides=request.overrides,
        plugins=request.plugins,
        seed=request.seed,
    )
    return found.recipe, found.note


def _preview(recipe: "Recipe", folder: Path, *, gathers: bool, note: str) -> None:
    """Build what would run, say what it will take, and leave nothing."""
    from vestige.errors import RecipeError
    from vestige.recipes.build import build
    from vestige.recipes.estimate import estimate

    if gathers and (not recipe.arms or recipe.headline is None):
        raise RecipeError("the recipe has no arms or names no headline arm; run it without arms")
    minutes: list[float | None] = []
    for name in recipe.arms if gathers else [""]:
        out = folder / "arms" / name if gathers else folder
        found = estimate(build(recipe.arm(name) if gathers else recipe, out=out, arm=name))
        minutes.append(found.minutes)
        typer.echo(f"{recipe.arms[name].title if gathers else recipe.method}:")
        for line in found.lines():
            typer.echo(f"  {line}")
    known = [taken for taken in minutes if taken is not None]
    if gathers and len(known) == len(minutes):
        typer.echo(f"All {len(known)} arms: about {sum(known):.1f} min")
    if note:
        typer.echo(note)
    typer.echo(f"would write to {folder}; nothing was run")


def _tell_estimate(job: "Job", progress: "RunProgress", *, named: bool) -> None:
    """Say what a long run will take, once: not again when it goes on."""
    from vestige.recipes.estimate import estimate
    from vestige.recipes.run import has_checkpoint

    folder = job.trainer.out
    if folder is not None and has_checkpoint(folder):
        return
    found = estimate(job)
    if found.minutes is not None and found.minutes > _WORTH_TELLING_MINUTES:
        for line in found.lines():
            progress.say(f"{folder.name}: {line}" if named and folder is not None else line)


def _default_folder(stem: str, *, resume: bool) -> Path:
    """A new folder below runs/, or with `resume` the newest of that name."""
    taken = [path for number in range(1, 1000) if (path := _numbered(stem, number)).exists()]
    if resume and taken:
        return taken[-1]
    return next(path for number in range(1, 1001) if not (path := _numbered(stem, number)).exists())


def _numbered(stem: str, number: int) -> Path:
    return Path("runs") / (stem if number == 1 else f"{stem}-{number}")


def _print_result(summary: dict[str, Any], folder: Path) -> None:
    from rich.markup import escape

    from vestige.training.report.tables import arms_table, result_table

    shown = console()
    shown.print(result_table(summary))
    if summary.get("arm_details"):
        shown.print(arms_table(summary))
    if summary.get("note"):
        shown.print(escape(str(summary["note"])))
    for finding in summary["diagnosis"]:
        shown.print(
            f"[yellow]{finding['code']}[/]: {escape(finding['message'])}. "
            f"Knob: {escape(finding['knob'])}"
        )
    left = (
        *(
            "samples.png",
            "answers.png",
            "clients.png",
            "report.html",
            "summary.json",
            "comparison.json",
            "student.safetensors",
        ),
        "pool",
    )
    typer.echo(f"{folder}: {', '.join(name for name in left if (folder / name).exists())}")
