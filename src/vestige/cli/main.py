"""`vestige`: entry point, error handling and exit codes."""

import logging
import sys

import typer

from vestige.cli import bench, listing, runs, teachers

DONE, FAILED, WRONG_REQUEST, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="vestige",
    help="Data-free knowledge distillation: teach a student from a trained network alone.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
runs.register(app)
listing.register(app)
teachers.register(app)
app.add_typer(bench.app, name="bench")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with one of the documented exit codes."""
    from vestige.errors import (
        DataError,
        Interrupted,
        MissingExtraError,
        RecipeError,
        ShapeError,
        TeacherError,
        VestigeError,
    )

    handler = logging.StreamHandler(sys.stderr)
    # The trainer's are shown beside the progress bar, with the name of the arm.
    handler.addFilter(lambda record: record.name != "vestige.training.trainer")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("vestige").setLevel(logging.INFO)
    try:
        app(args=arguments, prog_name="vestige", standalone_mode=True)
    except (DataError, MissingExtraError, RecipeError, ShapeError, TeacherError) as error:
        _leave(WRONG_REQUEST, str(error))
    except Interrupted as error:
        _leave(INTERRUPTED, str(error))
    except VestigeError as error:
        _leave(FAILED, str(error))
    except KeyboardInterrupt:
        _leave(INTERRUPTED, "stopped before a run began")
    except OSError as error:
        _leave(FAILED, f"the run could not read or write: {error}")


def _leave(code: int, message: str) -> None:
    sys.stderr.write(f"vestige: {message}\n")
    sys.exit(code)
