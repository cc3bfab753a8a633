"""A progress bar over one run or several arms, with the time left."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from vestige.training.tracking import Callback, Event


class RunProgress:
    """Shows how far each arm is; a context manager.

    The length of a round in steps is taken from the round before, so within the first round the
    bar stands still.
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
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._all = self._progress.add_task("all arms", total=len(self._arms), note="")
        self._tasks: dict[str, Any] = {}
        if len(self._arms) == 1:
            self._progress.update(self._all, visible=False)

    @property
    def console(self) -> Any:
        """Where other lines may be printed while the bar is shown."""
        return self._progress.console

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

    def callbacks(self, arm: str) -> "Sequence[Callback]":
        """What to hand to the trainer of `arm`."""
        return (self._follow(arm),)

    def _follow(self, arm: str) -> "Callable[[Event], None]":
        task = self._progress.add_task(arm, total=1.0, note="", visible=False, start=False)
        index = self._arms.index(arm)
        position = {"step": 0, "share": 0.0, "next": 0.0, "steps": 0}

        def show(share: float) -> None:
            self._progress.update(task, completed=share)
            self._progress.update(self._all, completed=index + share)

        def follow(event: "Event") -> None:
            data = event.data
            if event.kind == "start":
                # Not before: what is wrong with a request is told without a bar above it.
                self._progress.start_task(task)
                self._progress.update(task, visible=True)
                position["step"] = data["step"]
            elif event.kind == "round":
                position["steps"] = data["step"] - position["step"]
                position["step"] = data["step"]
                position["share"] = data["round"] / data["rounds"]
                position["next"] = 1 / data["rounds"]
                show(position["share"])
            elif event.kind == "step" and position["steps"]:
                within = min(1.0, (data["step"] - position["step"]) / position["steps"])
                show(min(1.0, position["share"] + within * position["next"]))
            elif event.kind == "evaluation":
                score = next(iter(data["scores"].values()))
                self._progress.update(task, note=f"test {score:.1%}")
            elif event.kind == "warning":
                self._progress.console.print(
                    f"{arm}: {data['message']}", style="yellow", markup=False, highlight=False
                )
            elif event.kind == "end":
                show(1.0)

        return follow
