"""`vestige`: entry point, error handling and exit codes."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import FrameType
from typing import Annotated

import typer

from vestige.cli import bench, doctor, federate, listing, models, pools, recipes, runs, teachers
from vestige.cli.output import examples

DONE, FAILED, WRONG_REQUEST, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="vestige",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from vestige import __version__

        typer.echo(f"vestige {__version__}")
        raise typer.Exit


@app.callback(
    epilog=examples("vestige demo", "vestige doctor", "vestige list methods", "vestige run dfad")
)
def vestige(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it and leave."),
    ] = False,
) -> None:
    """Data-free knowledge distillation: teach a student from a trained network alone."""


runs.register(app)
recipes.register(app)
listing.register(app)
teachers.register(app)
models.register(app)
doctor.register(app)
app.add_typer(federate.app, name="federate")
app.add_typer(pools.app, name="pool")
app.add_typer(bench.app, name="bench")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with one of the documented exit codes."""
    from vestige.errors import (
        DataError,
        Interrupted,
        MissingExtraError,
        QueryBudgetExceeded,
        RecipeError,
        ShapeError,
        TeacherError,
        VestigeError,
    )

    handler = logging.StreamHandler(sys.stderr)
    # A run's warnings are shown beside the progress bar, with the name of the arm.
    handler.addFilter(lambda record: not getattr(record, "is_event", False))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("vestige").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        # As `python -m vestige` has it, so that a recipe may name a factory beside it. Last, so
        # that nothing there takes the place of a package.
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)
        with _one_voice(handler):
            app(args=arguments, prog_name="vestige", standalone_mode=True)
    except QueryBudgetExceeded as error:
        # A teacher's error, but one of the run: --resume with a larger budget goes on.
        _leave(FAILED, str(error), error)
    except (DataError, MissingExtraError, RecipeError, ShapeError, TeacherError) as error:
        _leave(WRONG_REQUEST, str(error), error)
    except Interrupted as error:
        _leave(INTERRUPTED, str(error), error)
    except VestigeError as error:
        _leave(FAILED, str(error), error)
    except KeyboardInterrupt as error:
        _leave(INTERRUPTED, "stopped before a run began", error)
    except BrokenPipeError:
        _quiet_exit()
    except OSError as error:
        remedy = "see to path, permissions and space"
        _leave(FAILED, f"the run could not read or write: {error}; {remedy}", error)


def _terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM is treated as Ctrl-C wherever it comes."""
    raise KeyboardInterrupt


def _quiet_exit() -> None:
    """Leave without a word: whoever read the output has gone."""
    # Or the interpreter would complain when it flushes on its way out.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(DONE)


@contextmanager
def _one_voice(handler: logging.Handler) -> Iterator[None]:
    """Of the processes that torchrun started only the first one talks, until something fails."""
    if not _follows():
        yield
        return
    handler.setLevel(logging.CRITICAL)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _follows() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"


def _leave(code: int, message: str, error: BaseException) -> None:
    if _tells(error):
        sys.stderr.write(f"vestige: {message}\n")
    sys.exit(code)


def _tells(error: BaseException) -> bool:
    """Whether no other process tells the same; before they meet, all fail at the same thing."""
    from vestige.errors import TOLD_ELSEWHERE, TOLD_HERE

    notes = getattr(error, "__notes__", ())
    return TOLD_HERE in notes or not (_follows() or TOLD_ELSEWHERE in notes)
