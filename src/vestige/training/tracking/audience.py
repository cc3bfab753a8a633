"""Whoever follows a run: the metrics file, trackers, callbacks and the log."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vestige.core import parallel, seeding
from vestige.training.tracking import Callback, Event
from vestige.training.tracking.metrics import MetricsFile
from vestige.training.tracking.trackers import Trackers
from vestige.training.trainer_config import TrainerConfig

logger = logging.getLogger(__name__)


class Audience:
    """Tells each of them once: of several processes the first one writes and calls.

    Args:
        out: run folder, or None to write nothing.
        config: names the trackers.
        identity: of the run; trackers are told it with the config.
        callbacks: called with each event; may grow while the run is prepared.
    """

    def __init__(
        self,
        out: Path | None,
        config: TrainerConfig,
        identity: Mapping[str, Any],
        callbacks: list[Callback],
    ) -> None:
        writes = parallel.rank() == 0
        self.callbacks = callbacks
        self.trackers = Trackers(
            config.track if writes else (),
            out,
            {**identity, "trainer": config.model_dump(mode="json")},
        )
        self.metrics = MetricsFile(
            out / "metrics.jsonl" if out is not None and writes else None, self.trackers.rows
        )

    def tell(self, kind: str, **data: Any) -> None:
        """Call the callbacks with an event; what they draw changes nothing."""
        # Also without: who shows a progress bar has a callback more than the others.
        if self.callbacks or parallel.world() > 1:
            parallel.first(partial(self._call, Event(kind, data)))

    def warn(self, step: int, message: str) -> None:
        """Say in the log, to the trackers and to the callbacks what was noticed by `step`."""
        if parallel.rank() == 0:
            # Whoever shows the event as well can tell the two apart by the mark.
            logger.warning(message, extra={"is_event": True})
        self.trackers.note(step, message)
        self.tell("warning", message=message)

    def _call(self, event: Event) -> None:
        with seeding.preserved():
            for callback in self.callbacks:
                callback(event)
