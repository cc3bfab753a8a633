"""How far one run or several arms are: a bar with the time left, or lines where nobody watches."""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from vestige.cli.output import console
from vestige.training.tracking import Callback, Event
from vestige.training.tracking.position import Position

# Between two lines where there is no terminal: at a new tenth of the run, and at any rate.
TENTH_SECONDS, LINE_SECONDS = 5.0, 30.0


class RunProgress:
    """Shows on stderr how far each arm is; a context manager.

    The length of a round in steps is taken from the round before, so within the first round the
    bar stands still. Where stderr is no terminal there is no bar, but a line now and then.
    """

    def __init__(self, arms: Sequence[str]) -> None:
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._arms = list(arms)
        self._console = console(stderr=True)
        self._lines = not self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=self._lines,
        )
        self._all = self._progress.add_task("all arms", total=len(self._arms), note="")
        if len(self._arms) == 1:
            self._progress.update(self._all, visible=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line above the bar."""
        self._console.print(text, style=style, markup=False, highlight=False)

    def callbacks(self, arm: str) -> Sequence[Callback]:
        """What to hand to the trainer of `arm`."""
        return (self._follow(arm),)

    def _follow(self, arm: str) -> Callback:
        task = self._progress.add_task(arm, total=1.0, note="", visible=False, start=False)
        index = self._arms.index(arm)
        line = _Lines(arm, len(self._arms), index, self.say) if self._lines else None
        position = Position()

        def show() -> None:
            share = position.share
            self._progress.update(task, completed=share)
            self._progress.update(self._all, completed=index + share)
            if line is not None:
                line.show(share)

        def follow(event: Event) -> None:
            data = event.data
            position.follow(event)
            if event.kind == "start":
                # Not before: what is wrong with a request is told without a bar above it.
                self._progress.start_task(task)
                self._progress.update(task, visible=True)
            elif event.kind in ("round", "end") or (event.kind == "step" and position.rounds):
                show()
            elif event.kind == "evaluation":
                self._progress.update(task, note=position.judged)
                if line is not None:
                    line.note = f", {position.judged}"
            elif event.kind == "warning":
                self.say(f"{arm}: {data['message']}", style="yellow")

        return follow


class _Lines:
    """What stands for one arm's bar in a log."""

    def __init__(self, arm: str, arms: int, index: int, say: Callable[[str], Any]) -> None:
        self.note = ""
        self._name = f"{arm} ({index + 1} of {arms})" if arms > 1 else arm
        self._say = say
        self._tenth = 0
        self._started = self._told = time.monotonic()

    def show(self, share: float) -> None:
        """Say how far the arm is if that is news."""
        now = time.monotonic()
        tenth, waited = int(share * 10 + 1e-9), now - self._told
        if waited < TENTH_SECONDS or (tenth == self._tenth and waited < LINE_SECONDS):
            return
        self._tenth, self._told = tenth, now
        self._say(f"{self._name}: {share:.0%} after {now - self._started:.0f} s{self.note}")
