"""Follow a run where it is watched: a live table in a notebook, a bar on a terminal."""

import html
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vestige.training.report.tables import metric_name
from vestige.training.tracking import Callback, Event
from vestige.training.tracking.position import Position, duration

_BETWEEN_S = 0.5


def as_table(position: Position) -> str:
    """The state of a run as an HTML table of two columns."""
    left = position.left_s
    rows = [
        ("round", f"{position.round} of {position.rounds or '?'} ({position.share:.0%})"),
        ("step", f"{position.step:,}"),
        ("time left", "unknown" if left is None else duration(left)),
    ]
    for role, terms in position.terms.items():
        values = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        rows.append((f"{role} loss", values))
    if position.agreement is not None:
        rows.append(("agreement on fresh inputs", f"{position.agreement:.1%}"))
    rows += [
        (f"test {metric_name(name)}", f"{value:.4g}") for name, value in position.scores.items()
    ]
    rows += [("noticed", message) for message in position.warnings]
    return table(rows)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, escaped, as an HTML table."""
    cells = "".join(
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this program."""
    return getattr(_shell(), "kernel", None) is not None


@contextmanager
def shown(progress: bool | None) -> Iterator[Sequence[Callback]]:
    """Callbacks that show a run inside the block.

    Args:
        progress: None shows a table in a notebook and a bar where stderr is a terminal; True shows
            one of them anyway, False nothing.
    """
    if progress is None:
        progress = in_notebook() or sys.stderr.isatty()
    if not progress:
        yield ()
    elif in_notebook():
        yield (_live_table(),)
    else:
        with _bar() as callback:
            yield (callback,)


def _shell() -> Any:
    # Never imported: where there is a notebook, it has been.
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


def _live_table() -> Callback:
    display: Any = sys.modules["IPython"].display
    position, told = Position(), [0.0]
    handle: Any = display.display(display.HTML(as_table(position)), display_id=True)

    def follow(event: Event) -> None:
        position.follow(event)
        now = time.monotonic()
        # A step may take a millisecond, and a browser cannot be asked a thousand times a second.
        if now - told[0] >= _BETWEEN_S or event.kind == "end":
            told[0] = now
            handle.update(display.HTML(as_table(position)))

    return follow


@contextmanager
def _bar() -> Iterator[Callable[[Event], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
    task = bar.add_task("distill", total=1.0, note="")
    position = Position()

    def follow(event: Event) -> None:
        position.follow(event)
        left = position.left_s
        notes = ["" if left is None or position.over else f"{duration(left)} left"]
        notes += [
            f"test {metric_name(name)} {value:.4g}" for name, value in position.scores.items()
        ]
        note = "  ".join(part for part in notes if part)
        bar.update(task, completed=position.share, note=note)

    with bar:
        yield follow
