"""Time and steps of a run, and when they are spent."""

import time
from collections.abc import Callable

from vestige.core import parallel
from vestige.core.protocols import Progress


class Budget:
    """The clock of a run; a budget ends the run at a round's end and bends no schedule.

    Args:
        progress: of the run.
        minutes: after which the run stops; None for no limit.
        max_steps: after which the run stops; None for no limit.
        warn: told once, as soon as it is seen that the minutes will not suffice.

    Attributes:
        seconds_before: of the earlier parts of a resumed run.
    """

    def __init__(
        self,
        progress: Progress,
        *,
        minutes: float | None,
        max_steps: int | None,
        warn: Callable[[str], None],
    ) -> None:
        self.progress = progress
        self.minutes = minutes
        self.max_steps = max_steps
        self.seconds_before = 0.0
        self._warn = warn
        self._warned = False
        self._started = 0.0
        self._round_started = 0.0

    def start(self) -> None:
        """The run begins, or goes on."""
        self._started = self._round_started = time.perf_counter()

    def start_round(self) -> None:
        """A round begins."""
        self._round_started = time.perf_counter()

    def seconds(self) -> float:
        """Time spent, earlier parts included."""
        return self.seconds_before + time.perf_counter() - self._started

    def spent(self) -> bool:
        """Whether the run stops here; the same in every process."""
        progress = self.progress
        if self.max_steps is not None and progress.steps >= self.max_steps:
            return True
        if self.minutes is None:
            return False
        spent, round_seconds = parallel.first(
            lambda: (self.seconds(), time.perf_counter() - self._round_started)
        )
        left = self.minutes * 60 - spent
        missing = progress.rounds - progress.round
        fitting = max(0, int(left / max(round_seconds, 1e-9)))
        if fitting < missing and not self._warned:
            self._warned = True
            self._warn(
                f"the budget of {self.minutes:g} minutes is enough for about "
                f"{progress.round + fitting} of {progress.rounds} rounds of {progress.loop!r}; "
                "schedules are not shortened, so set fewer rounds if the learning rate should "
                "decay in time"
            )
        return left <= 0
