"""Whoever follows a run: the metrics file, trackers, callbacks and what is shown of it."""

from vestige.training.tracking.events import Callback, Event

__all__ = ["Callback", "Event"]
