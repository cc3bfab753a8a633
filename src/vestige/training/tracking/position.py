"""How far a run is, and how long something takes, in words."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from vestige.training.report.tables import format_score, metric_name
from vestige.training.tracking.events import Event


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
        metric: the score that counts.
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
    metric: str = ""
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
            self.metric = data.get("metric") or next(iter(self.scores), "")
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
    def judged(self) -> str:
        """The last score that counts, in words; "" before there was one."""
        if self.metric not in self.scores:
            return ""
        score = format_score(self.scores[self.metric], self.metric)
        return f"test {metric_name(self.metric)} {score}"

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


def duration(seconds: float) -> str:
    """Seconds below a minute and a half, hours from two on, minutes in between."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
