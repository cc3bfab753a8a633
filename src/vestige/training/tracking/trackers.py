"""The trackers of a run: which are told, and what each knows already.

They get the rows of the metrics file, each once: which step a tracker knows is kept in the run
folder, so a resumed run neither repeats rows nor leaves any out.
"""

import difflib
import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vestige.core import parallel, seeding
from vestige.core.types import Inputs, InputSpec
from vestige.errors import MissingExtraError, RecipeError
from vestige.training import guard
from vestige.training.files import write_json
from vestige.training.moments import drawable
from vestige.training.pictures import contact_sheet
from vestige.training.tracking.backends import TRACKERS, TrackedRun, Tracker
from vestige.training.tracking.metrics import read_metrics, scalars_of

logger = logging.getLogger(__name__)

_SHEET_IMAGES, _SHEET_COLUMNS = 64, 8
_INSTALLED_BY = {"tensorboard": "'vestige[track]'"}


def check_names(names: Sequence[str]) -> None:
    """Refuse names that are no trackers.

    Raises:
        RecipeError: with the nearest valid one.
    """
    for name in names:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(
                f"got the tracker {name!r}, expected some of {', '.join(TRACKERS)}{hint}"
            )


class Trackers:
    """The trackers that a run was asked to tell; one that fails is left out, and the run goes on.

    A context manager that may be entered again inside: what was opened is closed when the outermost
    block is left.

    Args:
        names: of `TRACKERS`.
        out: run folder; trackers keep their files and what they know in `trackers/` below it.
        config: the resolved recipe.

    Raises:
        RecipeError: a name is unknown or given twice, or there is no run folder.
        MissingExtraError: a package is not installed.
    """

    def __init__(self, names: Sequence[str], out: Path | None, config: Mapping[str, Any]) -> None:
        check_names(names)
        if len(set(names)) < len(names):
            raise RecipeError(f"track: got {list(names)}, expected each name once")
        for name in names:
            if find_spec(name) is None:
                raise MissingExtraError(
                    f"track: {name!r} needs a package that is not installed; "
                    f"pip install {_INSTALLED_BY.get(name, name)}, or leave it out"
                )
        if names and out is None:
            raise RecipeError(
                f"track: got {list(names)} without a run folder, expected one, since trackers keep "
                "their files in it; name a folder (out) or track nothing"
            )
        # Of several processes the first one tells.
        self._names = list(names) if parallel.rank() == 0 else []
        self._out, self._config = out, config
        self._open: dict[str, Tracker] = {}
        self._known: dict[str, dict[str, Any]] = {}
        self._began: dict[str, int] = {}
        self._picture: tuple[int, NDArray[np.uint8]] | None = None
        self._depth = 0

    def __bool__(self) -> bool:
        return bool(self._names)

    def __enter__(self) -> Self:
        self._depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._each(lambda tracker: tracker.close(failed=kind is not None))
            self._open.clear()

    def start(self, *, resumed: bool) -> None:
        """Open the trackers; on a resumed run, with what they missed of the metrics file.

        Args:
            resumed: go on with the runs that the trackers know. False makes new ones.
        """
        if self._out is None or not self._names:
            return
        self._known = self._read() if resumed else {}
        metrics = self._out / "metrics.jsonl"
        rows = read_metrics(metrics) if resumed and metrics.is_file() else []
        for name in self._names:
            old = self._known.get(name)
            known = old or {"id": secrets.token_hex(4), "step": -1}
            self._known[name] = known
            run = TrackedRun(
                id=str(known["id"]),
                name=self._out.resolve().name,
                folder=self._out / "trackers",
                config=self._config,
                resumed=old is not None,
                step=int(known["step"]),
            )
            self._began[name] = run.step
            self._open_one(name, run)
        self.rows(rows)
        self._write()

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of the metrics file, in order; a tracker skips those of steps that it knows."""
        if not self._open or not rows:
            return
        steps: dict[int, list[Mapping[str, Any]]] = {}
        for row in rows:
            steps.setdefault(int(row["step"]), []).append(row)
        for step, of_step in steps.items():
            self._scalars(step, scalars_of(of_step))
        if self._picture is not None:
            self._send_picture(*self._picture)
            self._picture = None
        self._write()

    def picture(self, step: int, spec: InputSpec, samples: tuple[Inputs, Tensor] | None) -> None:
        """A sheet of the latest inputs, where they are images.

        It is sent after the rows of its step: some trackers refuse steps that go back.

        Args:
            step: of the run.
            spec: of one input.
            samples: inputs (N, *shape) in the teacher's normalised space, and classes; or None.
        """
        if not self._open or samples is None or not drawable(spec):
            return
        if not isinstance(samples[0], Tensor):
            return
        images = spec.denormalize(samples[0][-_SHEET_IMAGES:].float())
        scale = max(1, 64 // images.shape[-1])
        self._picture = (step, contact_sheet(images, columns=_SHEET_COLUMNS, scale=scale))

    def note(self, step: int, text: str) -> None:
        """A warning or a finding."""
        self._each(lambda tracker: tracker.note(step, text))

    def summary(self, values: Mapping[str, Any]) -> None:
        """The contents of summary.json."""
        self._each(lambda tracker: tracker.summary(int(values["steps"]), values))

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, tracker in self._new_to(step):
            self._guarded(name, lambda open_one: open_one.scalars(step, values), tracker)
            if name in self._open:
                self._known[name]["step"] = step

    def _send_picture(self, step: int, picture: NDArray[np.uint8]) -> None:
        for name, tracker in self._new_to(step):
            self._guarded(name, lambda open_one: open_one.picture(step, picture), tracker)

    def _new_to(self, step: int) -> list[tuple[str, Tracker]]:
        """The trackers that did not know the step when the run began."""
        return [(n, tracker) for n, tracker in self._open.items() if step > self._began[n]]

    def _open_one(self, name: str, run: TrackedRun) -> None:
        def make(_: Any) -> None:
            self._open[name] = TRACKERS[name](run)

        self._guarded(name, make, None)

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, act, tracker)

    def _guarded(self, name: str, act: Callable[[Any], None], tracker: Any) -> None:
        try:
            with seeding.preserved(), guard.trusting():
                act(tracker)
        # Other people's packages raise whatever they like; none of it is worth a run.
        except Exception as error:
            self._open.pop(name, None)
            logger.warning(
                "tracker %r failed (%s: %s); the run goes on without it and metrics.jsonl stands. "
                "What it missed so far is sent on --resume",
                name,
                type(error).__name__,
                error,
            )

    def _read(self) -> dict[str, dict[str, Any]]:
        """What each tracker knows; a file that is damaged counts as none."""
        try:
            found = json.loads(self._state_file().read_text(encoding="utf8"))
            return {
                str(name): {"id": str(known["id"]), "step": int(known["step"])}
                for name, known in found.items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    def _write(self) -> None:
        if self._known:
            try:
                write_json(self._state_file(), self._known)
            except OSError as error:
                logger.warning("%s cannot be written: %s", self._state_file(), error)

    def _state_file(self) -> Path:
        return Path(str(self._out)) / "trackers" / "state.json"
