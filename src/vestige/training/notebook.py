"""Follow a run where it is watched: a live table in a notebook, a bar on a terminal."""

import html
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vestige.training.tracking import Callback, Event

_BETWEEN_S = 0.5


@dataclass
class Position:
    """How far a run is, taken from its events.

    Attributes:
        loop: name of the running loop.
        round: finished rounds of it.
        rounds: all rounds of it; 0 before the first is over.
        step: optimizer steps of the whole run.
        terms: the latest loss terms by role.
        agreement: with the teacher on the fresh inputs of the last round.
        scores: of the last evaluation.
        warnings: what was noticed.
        over: whether the run is at its end.
    """

    loop: str = ""
    round: int = 0
    rounds: int = 0
    step: int = 0
    terms: dict[str, Mapping[str, float]] = field(default_factory=dict)
    agreement: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    over: bool = False
    _first: tuple[int, float] = (0, 0.0)
    _last: float = 0.0
    _began: int = 0
    _length: int = 0

    def follow(self, event: Event) -> None:
        """Take in one event."""
        data = event.data
        self.step = data.get("step", self.step)
        if event.kind == "start":
            self._began = self.step
        elif event.kind == "step":
            self.terms.update(data["terms"])
        elif event.kind == "evaluation":
            self.scores = data["scores"]
        elif event.kind == "round":
            self._last = time.monotonic()
            # A resumed run begins somewhere: its pace is counted from the first round seen.
            if data["loop"] != self.loop or not self.rounds:
                self._first = (data["round"], self._last)
            self.loop, self.round, self.rounds = data["loop"], data["round"], data["rounds"]
            self.agreement = data["agreement"]
            self._length, self._began = self.step - self._began, self.step
        elif event.kind == "warning":
            self.warnings.append(data["message"])
        elif event.kind == "end":
            self.over = True

    @property
    def share(self) -> float:
        """Finished share of the running loop, in [0, 1]; within a round by the last one's steps."""
        if self.over:
            return 1.0
        if not self.rounds:
            return 0.0
        within = min(1.0, (self.step - self._began) / self._length) if self._length else 0.0
        return min(1.0, (self.round + within) / self.rounds)

    @property
    def left_s(self) -> float | None:
        """Seconds to the end of the running loop; None until two of its rounds were seen."""
        if self.over:
            return 0.0
        number, when = self._first
        if self.round <= number:
            return None
        pace = (self._last - when) / (self.round - number)
        return max(0.0, pace * (self.rounds - self.round) - (time.monotonic() - self._last))


def as_table(position: Position) -> str:
    """The state of a run as an HTML table of two columns."""
    left = position.left_s
    rows = [
        ("round", f"{position.round} of {position.rounds or '?'} ({position.share:.0%})"),
        ("step", f"{position.step:,}"),
        ("time left", "unknown" if left is None else _minutes(left)),
    ]
    for role, terms in position.terms.items():
        values = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        rows.append((f"{role} loss", values))
    if position.agreement is not None:
        rows.append(("agreement on fresh inputs", f"{position.agreement:.1%}"))
    rows += [(f"test {name}", f"{value:.4g}") for name, value in position.scores.items()]
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
        notes = ["" if left is None or position.over else f"{_minutes(left)} left"]
        notes += [f"test {name} {value:.4g}" for name, value in position.scores.items()]
        note = "  ".join(part for part in notes if part)
        bar.update(task, completed=position.share, note=note)

    with bar:
        yield follow


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
