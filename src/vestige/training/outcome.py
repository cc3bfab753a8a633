"""What a run came to."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from vestige.core.types import Inputs, Result
from vestige.training.diagnosis import Finding
from vestige.training.moments import Moment


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        result: what the user gets.
        scores: one entry per evaluation, "step" and the task's metrics; the last is the headline.
        findings: what the diagnosis noticed.
        steps: optimizer steps, earlier parts of a resumed run included.
        seconds: time spent, earlier parts included.
        teacher_queries: rows that the teachers were asked.
        samples: (inputs, the teacher's classes) of the latest student batches, or None.
        complete: False if a budget stopped the run.
        moments: inputs at about 8 moments of the run; empty where they cannot be drawn.
        retention: see `Retention.figures`; None where it cannot be told.
        teacher_gradients: rows of the teachers' answers that carried a graph back to the inputs.
        images_made: inputs made for the student, see `Made`; None where that cannot be told. What
            was drawn from real data counts, too.
        coverage: see `Diagnosis.coverage`.
    """

    result: Result
    scores: list[dict[str, float]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    teacher_queries: int = 0
    samples: tuple[Inputs, Tensor] | None = None
    complete: bool = True
    moments: list[Moment] = field(default_factory=list)
    retention: dict[str, float] | None = None
    teacher_gradients: int = 0
    images_made: int | None = None
    coverage: dict[str, float] | None = None

    @property
    def network(self) -> nn.Module | None:
        """The result, if it is a network."""
        found = self.result.object
        return found if isinstance(found, nn.Module) else None
