"""What a checkpoint of a run holds, how it is written, and how a resumed run takes it over."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vestige.core import modes, parallel, seeding
from vestige.core.protocols import KeepsAnswers, Sharded, Stateful, Teacher
from vestige.errors import CheckpointError, ContractError, NonFiniteLossError
from vestige.training.budget import Budget
from vestige.training.checkpoint import CheckpointStore
from vestige.training.context import RunContext
from vestige.training.parts import networks_of
from vestige.training.sharding import state_number
from vestige.training.tracking.metrics import MetricsFile
from vestige.training.watch import Watch

KEPT_STATE = {
    *("identity", "number", "seconds", "context", "parts", "flags", "globals", "diagnosis"),
    *("scores", "queries", "gradients", "samples", "moments", "retention", "made"),
    *("student_steps", "rows"),
}


class RunState:
    """Keeps the checkpoints of a run, and brings a resumed run back to the newest one.

    Args:
        out: run folder, or None to keep nothing.
        identity: what must not differ when the run is resumed.
        parts: gives everything with state by name; a method may make some between two loops.
        teachers: their query counts are kept, and those that keep answers are told where.
        ctx: positions, optimizers and randomness of the run.
        watch: what the run has shown so far.
        budget: the clock of the run.
        metrics: loses the rows that a resumed run writes again.

    Attributes:
        number: finished rounds of all loops.
        saved: the checkpoint that a resumed run has not come back to yet, or None.
        step: of the last checkpoint.
    """

    def __init__(
        self,
        out: Path | None,
        identity: Mapping[str, Any],
        *,
        parts: Callable[[], Mapping[str, Any]],
        teachers: Sequence[Teacher],
        ctx: RunContext,
        watch: Watch,
        budget: Budget,
        metrics: MetricsFile,
    ) -> None:
        self.number = 0
        self.saved: dict[str, Any] | None = None
        self.step = 0
        self._out = out
        self._store = None if out is None else CheckpointStore(out / "checkpoints")
        self._identity = identity
        self._parts = parts
        self._teachers = teachers
        self._ctx = ctx
        self._watch = watch
        self._budget = budget
        self._metrics = metrics

    def kept(self) -> str:
        """The end of a message: which checkpoint is there; "" without a run folder."""
        if self._store is None:
            return ""
        return f". The last checkpoint, at step {self.step}, is kept"

    # What a checkpoint holds

    def checkpoint(self) -> None:
        """Write one; nothing without a run folder.

        Raises:
            NonFiniteLossError: a weight became NaN or infinite; such a state is not kept.
            ContractError: the processes do not have the same weights and generators.
        """
        if self._store is None:
            return
        self._check_weights()
        self._check_processes()
        parallel.first(partial(self._save, self._store))
        for teacher in self._teachers:
            if isinstance(teacher, KeepsAnswers):
                teacher.checkpointed()
        self.step = self._ctx.progress.steps

    def _save(self, store: CheckpointStore) -> None:
        parts = self._parts()
        state = {
            "identity": self._identity,
            "number": self.number,
            "seconds": self._budget.seconds(),
            "context": self._ctx.state(),
            "parts": {n: p.state_dict() for n, p in parts.items() if isinstance(p, Stateful)},
            "flags": {name: modes.flags(net) for name, net in networks_of(parts).items()},
            "globals": seeding.global_state(),
            "queries": [getattr(teacher, "queries", 0) for teacher in self._teachers],
            "gradients": [getattr(teacher, "gradients", 0) for teacher in self._teachers],
            "rows": self._metrics.rows,
            **self._watch.state_dict(),
        }
        growing = {name: part for name, part in parts.items() if isinstance(part, Sharded)}
        store.save(self.number, state, growing)

    def _restore(self, saved: Mapping[str, Any], *, complete: bool) -> None:
        self._restore_parts(saved, complete=complete)
        for count in ("queries", "gradients"):
            for teacher, rows in zip(self._teachers, saved[count], strict=True):
                if hasattr(teacher, count):
                    setattr(teacher, count, rows)
        self._watch.load_state_dict(saved)
        self._ctx.restore(saved["context"], complete=complete)
        # Last, because loading may draw: from here on the run draws what it would have drawn.
        seeding.set_global_state(saved["globals"])

    def _restore_parts(self, saved: Mapping[str, Any], *, complete: bool) -> None:
        store, parts = self._store, self._parts()
        if store is None:
            return
        known = {*saved["parts"], *saved["shards"]}
        # A part that is made between two loops does not exist yet while the first is skipped.
        if complete and set(parts) != known:
            raise CheckpointError(
                f"checkpoint and run differ in the parts {sorted(set(parts) ^ known)}; it is of "
                "another method or version"
            )
        for name, part in parts.items():
            if name not in known:
                continue
            try:
                if isinstance(part, Stateful):
                    part.load_state_dict(saved["parts"][name])
                if isinstance(part, Sharded):
                    part.load_shards(store.shards(saved["shards"][name]))
            except (RuntimeError, KeyError) as error:
                if isinstance(error, ContractError):
                    raise
                raise CheckpointError(
                    f"part {name!r} does not fit the checkpoint: {error}"
                ) from error
        for name, network in networks_of(self._parts()).items():
            if name in saved["flags"]:
                modes.set_flags(network, saved["flags"][name])

    # Coming back to it

    def open(self, *, resume: bool) -> None:
        """Clear what an earlier run left, or read the newest sound checkpoint.

        Raises:
            CheckpointError: the checkpoint is of another run or version.
        """
        self._load(resume=resume)
        if self._out is None:
            return
        # Steps that a resumed run repeats are answered from beside its checkpoints.
        for index, teacher in enumerate(self._teachers):
            if isinstance(teacher, KeepsAnswers):
                path = self._out / "checkpoints" / f"teacher-{index}.answers"
                teacher.keep_answers(path, resume=resume)

    def _load(self, *, resume: bool) -> None:
        store = self._store
        if store is None:
            return
        if not resume:
            parallel.first(store.clear)
            self._metrics.restart(0)
            return
        if parallel.world() > 1:
            # What is damaged is dropped by one process before the others look.
            parallel.first(partial(_look, store))
        self.saved = store.load()
        if parallel.differs(-1 if self.saved is None else int(self.saved["number"])):
            raise CheckpointError(
                f"the processes see different checkpoints in {self._out}, expected one folder for "
                "all; put it where every machine can read it"
            )
        if self.saved is None:
            self._metrics.restart(0)
            return
        self._check_same(self.saved)
        self.number = int(self.saved["number"])
        self.step = int(self.saved["context"]["progress"]["steps"])
        self._budget.seconds_before = float(self.saved["seconds"])
        self._metrics.restart(int(self.saved["rows"]))

    def _check_same(self, saved: Mapping[str, Any]) -> None:
        missing = sorted(KEPT_STATE - set(saved))
        if missing:
            raise CheckpointError(
                f"the checkpoint in {self._out} holds nothing of {', '.join(missing)}; it is of "
                "another version of vestige. Resume with that version, or start in a new folder"
            )
        changed = sorted(
            key
            for key in {*self._identity, *saved["identity"]}
            if self._identity.get(key) != saved["identity"].get(key)
        )
        if changed:
            raise CheckpointError(
                f"the run in {self._out} was started with other settings ({', '.join(changed)}); "
                "resume with the recipe it was started with, or start in a new folder"
            )

    def begin_loop(self, name: str, n: int) -> int:
        """Rounds of the loop that are done; a resumed run is brought back to its checkpoint here.

        Args:
            name: of the loop.
            n: its rounds.

        Raises:
            CheckpointError: the checkpoint stands in another loop, or does not fit the run.
        """
        if self.saved is None:
            if self.number == 0:
                self.checkpoint()
            return 0
        position = self.saved["context"]["progress"]
        if name in position["finished"]:
            self._restore(self.saved, complete=False)
            self._ctx.rounds_done[name] = int(position["finished"][name])
            return n
        if name != position["loop"]:
            raise CheckpointError(
                f"the checkpoint stands in loop {position['loop']!r}, and the run began loop "
                f"{name!r}; it is of another method or version. Start again without --resume"
            )
        done = int(position["round"])
        self._restore(self.saved, complete=done < n)
        self.saved = None
        # A budget that was spent before the run was resumed is spent.
        self._ctx.stopping = self._budget.spent()
        return done

    # What is not kept

    def _check_weights(self) -> None:
        """A finite loss may break weights in its last update."""
        for name, network in networks_of(self._parts()).items():
            for key, values in network.state_dict().items():
                if isinstance(values, Tensor) and not torch.isfinite(values).all():
                    raise NonFiniteLossError(
                        f"{key!r} of {name!r} became NaN or infinite by step "
                        f"{self._ctx.progress.steps}, expected finite values; lower the learning "
                        f"rates or set a gradient clip{self.kept()}"
                    )

    def _check_processes(self) -> None:
        """Whoever draws from somewhere else in one process trains another network there."""
        if parallel.world() == 1:
            return
        if parallel.differs(state_number(networks_of(self._parts()), self._ctx.state())):
            raise ContractError(
                f"weights or generators are not the same in all {parallel.world()} processes by "
                f"step {self._ctx.progress.steps}; draw from ctx.rng, ctx.generator or the global "
                "generators only, and take nothing from the clock or the order of a set"
            )


def _look(store: CheckpointStore) -> None:
    # Reads it and sends nothing: weights are not handed from process to process.
    store.load()
