"""What a run will take, found out in a second or two before it starts.

A copy of the run makes its first steps, on few rows where the method says how many it takes, and
its passes are timed and multiplied. The run itself is not touched: its networks, plug-ins, counts
and streams of randomness are as they were.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from vestige.core import parallel, seeding
from vestige.core.protocols import Context, Method, Stateful
from vestige.core.types import Step
from vestige.errors import Interrupted, VestigeError
from vestige.recipes.build import Job
from vestige.training.checkpoint import encode
from vestige.training.passes import Measured, PassRecorder, PassTimer, split_pass, timed_networks
from vestige.training.tracking.position import duration
from vestige.training.trainer import Trainer

logger = logging.getLogger(__name__)

_FEW_ROWS = 8
# Work of the size that the run has is tried only if it promises to be over by then.
_PATIENCE_S = 1.0
_DATA_VALUES = 100_000
_CHECKPOINTS, _ROW_BYTES, _PAGES_MIB = 3, 400, 3.0


@dataclass(frozen=True)
class Estimate:
    """What a run will take; None where that cannot be known.

    Attributes:
        minutes: of training until the end or the run's own limit, evaluations not counted.
        teacher_passes: rows that the teachers will be asked.
        disk_mib: the most that the run folder holds at a time.
        unknown: why something cannot be known, or what is not counted.
    """

    minutes: float | None = None
    teacher_passes: int | None = None
    disk_mib: float | None = None
    unknown: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For the terminal."""
        known = [
            None if self.minutes is None else f"about {duration(max(1.0, 60 * self.minutes))}",
            None
            if self.teacher_passes is None
            else f"{self.teacher_passes:,} inputs through the teacher",
            None if self.disk_mib is None else f"{max(1, round(self.disk_mib)):,} MiB on disk",
        ]
        told = ", ".join(text for text in known if text is not None)
        return [*([f"Estimate: {told}"] if told else []), *self.unknown]


@dataclass
class _Rehearsal:
    """What the first steps of a copy showed."""

    measured: Measured
    rows: float
    rounds: int
    state_bytes: int


def estimate(job: Job) -> Estimate:
    """Minutes, teacher passes and disk of a run that has not started.

    Takes a second or two where the method has the setting `batch_size`, else about as long as its
    first few steps. Teachers that are not networks of this process are not asked anything.
    """
    trainer = job.trainer
    method = trainer.method
    settings = trainer.identity.get("config")
    if not isinstance(settings, Mapping):
        return Estimate(unknown=("No estimate: the method's settings are not on record.",))
    cfg: BaseModel = method.Config.model_validate(dict(settings))
    passes = {name: count for name, count in method.passes(cfg).items() if count > 0}
    if not passes:
        return Estimate(unknown=("No estimate: the method does not say which passes it makes.",))
    if job.judging is not None:
        return Estimate(unknown=("No estimate: clients train in their own time.",))
    if not all(isinstance(teacher, nn.Module) for teacher in trainer.teachers):
        return Estimate(
            unknown=("No estimate: the teacher is only asked what the run itself asks.",)
        )
    if parallel.world() > 1:
        # Each would stop its rehearsal at a step of its own and wait for the others for ever.
        return Estimate(unknown=("No estimate: several processes share the run.",))
    try:
        with seeding.preserved():
            seen, scale = _measured(trainer, cfg, passes)
    except Interrupted:
        raise
    except (VestigeError, RuntimeError, TypeError, MemoryError) as error:
        # The run itself says better what is wrong with it, or does without the copy's memory.
        logger.debug("no estimate", exc_info=error)
        return Estimate(unknown=(f"No estimate: the first steps of a copy failed ({error}).",))
    finally:
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(trainer.device)
    return _conclude(trainer, passes, seen, scale)


def _measured(
    trainer: Trainer, cfg: BaseModel, passes: Mapping[str, float]
) -> tuple[_Rehearsal, float]:
    """The passes, and how many times as many rows the run has."""
    size = getattr(cfg, "batch_size", None)
    if not isinstance(size, int) or size <= _FEW_ROWS:
        return _rehearse(trainer, cfg, passes), 1.0
    few = _rehearse(trainer, cfg.model_copy(update={"batch_size": _FEW_ROWS}), passes)
    scale = size / _FEW_ROWS
    # All passes of a round in proportion, the rarest once, twice over: rehearsed and timed.
    cycle = few.measured.total(passes) / min(passes.values())
    if 2 * scale * cycle > _PATIENCE_S:
        return few, scale
    return _rehearse(trainer, cfg, passes), 1.0


def _rehearse(trainer: Trainer, cfg: BaseModel, passes: Mapping[str, float]) -> _Rehearsal:
    """Run a copy until it has shown every network, then time its passes."""
    # What sources hold in large tensors is data, which drawing from them does not change.
    memo: dict[int, Any] = {
        id(value): value
        for source in trainer.sources.values()
        for value in vars(source).values()
        if isinstance(value, Tensor) and value.numel() > _DATA_VALUES
    }
    teachers, student, sources, plugins = copy.deepcopy(
        (trainer.teachers, trainer.student, trainer.sources, trainer.plugins), memo
    )
    make = cast("Callable[..., Method]", type(trainer.method))
    method = make(cfg, trainer.task, teachers, student, sources)
    rehearsing = _Rehearsing(method)
    scratch = Trainer(
        cast("Method", rehearsing),
        trainer.task,
        teachers=teachers,
        student=student,
        plugins=plugins,
        sources=sources,
        seed=trainer.seed,
        # Compiling takes longer than a whole estimate.
        config=trainer.config.model_copy(
            update={"compile": False, "minutes": None, "max_steps": None}
        ),
    )
    rehearsing.watch(scratch, passes, teachers)
    try:
        scratch.run()
    except _Seen:
        pass
    finally:
        rehearsing.recorder.close()
    found = rehearsing.found
    if found is None:
        raise TypeError("it ended without a step")
    return found


class _Seen(Exception):
    """Ends a rehearsal."""


class _Rehearsing:
    """A method that stops once its networks were seen at work."""

    recorder: PassRecorder

    def __init__(self, method: Method) -> None:
        self._method = method
        self.found: _Rehearsal | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def watch(self, trainer: Trainer, passes: Mapping[str, float], teachers: list[Any]) -> None:
        """Record the networks of the copied run `trainer`."""
        self._trainer = trainer
        self._passes = passes
        self.recorder = PassRecorder(
            timed_networks(self._method.parts(), teachers, trainer.student)
        )

    def run(self, ctx: Context) -> Iterator[Step]:
        started = time.monotonic()
        with self.recorder:
            for step in self._method.run(ctx):
                yield step
                late = time.monotonic() - started > _PATIENCE_S
                if late or self.recorder.complete(self._passes):
                    self.recorder.close()
                    self.found = self._conclude()
                    raise _Seen

    def _conclude(self) -> _Rehearsal:
        trainer, progress = self._trainer, self._trainer.ctx.progress
        timer = PassTimer(self.recorder, self._passes, trainer.device)
        # Once to warm up.
        timer.once()
        timer.take()
        timer.once()
        tensors: dict[str, Tensor] = {}
        parts = self._method.parts().values()
        encode([part.state_dict() for part in parts if isinstance(part, Stateful)], tensors)
        encode(trainer.ctx.state(), tensors)
        asked = self.recorder.calls.get("teacher", [])
        times = sum(call.count for call in asked)
        return _Rehearsal(
            measured=timer.take(),
            rows=sum(call.rows * call.count for call in asked) / times if times else 0.0,
            rounds=progress.rounds,
            state_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        )


def _conclude(
    trainer: Trainer, passes: Mapping[str, float], seen: _Rehearsal, scale: float
) -> Estimate:
    steps = seen.rounds * sum(n for name, n in passes.items() if split_pass(name)[1] == "step")
    config, share, told = trainer.config, 1.0, []
    if config.max_steps is not None and steps > config.max_steps:
        share = config.max_steps / steps
    seconds = sum(
        # An optimizer's step takes as long whatever the batch.
        passes[name] * taken * (1 if split_pass(name)[1] == "step" else scale)
        for name, taken in seen.measured.seconds.items()
    )
    minutes = share * seen.rounds * seconds / 60
    if config.minutes is not None and minutes > config.minutes:
        told.append(
            f"All rounds would take about {duration(60 * minutes)}; trainer.minutes stops the run "
            f"after {duration(60 * config.minutes)}."
        )
        share *= config.minutes / minutes
        minutes = config.minutes
    if seen.measured.unknown:
        told.append(f"Not counted: {', '.join(sorted(seen.measured.unknown))}.")
    if trainer.plugins:
        told.append(f"Not counted: what the plug-ins do ({', '.join(trainer.plugins)}).")
    if config.compile:
        told.append("Timed without compiling, which takes a minute or more and then saves time.")
    forwards = passes.get("teacher_forward", 0.0) + passes.get("teacher_observed", 0.0)
    asked = share * seen.rounds * forwards * seen.rows * scale
    disk = None
    if trainer.out is not None:
        rows = 2 * share * steps / config.log_every * _ROW_BYTES
        # Two are kept while a third is written; the student's weights weigh less than one.
        disk = _PAGES_MIB + ((_CHECKPOINTS + 1) * seen.state_bytes + rows) / 2**20
    return Estimate(
        minutes,
        round(asked) if seen.rows else None,
        disk,
        tuple(told),
    )
