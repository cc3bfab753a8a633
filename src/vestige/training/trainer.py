"""Drive a method: between two of its steps log, evaluate, checkpoint, watch the budget."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from vestige.core import modes, seeding
from vestige.core.protocols import (
    HoldsNetworks,
    Method,
    Plugin,
    Sharded,
    Source,
    Stateful,
    Task,
    Teacher,
)
from vestige.core.types import Requires, Result, Step
from vestige.errors import CheckpointError, ContractError, Interrupted, NonFiniteLossError
from vestige.teachers.loading import fingerprint
from vestige.training import guard, runtime
from vestige.training.checkpoint import CheckpointStore
from vestige.training.context import RunContext, ScopedContext
from vestige.training.diagnosis import Diagnosis, Finding
from vestige.training.tracking import Callback, Event, MetricsFile

logger = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module], Mapping[str, float]]
_SAMPLE_BATCHES, _SAMPLE_ROWS, _SAMPLE_BYTES = 8, 64, 16 * 2**20


class TrainerConfig(BaseModel):
    """How a run is driven; apart from budgets nothing here is meant to change what is learned.

    Attributes:
        device: "auto" takes a GPU if there is one, else "cpu", "cuda" or "cuda:1".
        log_every: optimizer steps between two rows of the metrics file; higher is faster on a GPU.
        evaluate_every: rounds between two evaluations; the last round is always evaluated.
        checkpoint_every: rounds between two checkpoints; the last round always gets one.
        minutes: the run stops at the end of the round in which this much time has passed.
        threads: of torch on the CPU; None leaves torch's choice. Networks of a few thousand weights
            are as fast on one thread, and many times faster where others use the machine, too.
        max_steps: the run stops at the end of the round in which this many steps were done.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = "auto"
    threads: int | None = Field(None, ge=1, le=1024)
    log_every: int = Field(10, ge=1)
    evaluate_every: int = Field(1, ge=1)
    checkpoint_every: int = Field(1, ge=1)
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_steps: int | None = Field(None, ge=1)


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
    """

    result: Result
    scores: list[dict[str, float]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    teacher_queries: int = 0
    samples: tuple[Tensor, Tensor] | None = None
    complete: bool = True

    @property
    def network(self) -> nn.Module | None:
        """The result, if it is a network."""
        found = self.result.object
        return found if isinstance(found, nn.Module) else None


class Trainer:
    """Runs one method to its end, or to the end of its budget.

    Args:
        method: built, not yet run.
        task: judges nothing here, but is shown to plug-ins and to the diagnosis.
        teachers: handed to plug-ins; their query counts are kept with the run.
        student: evaluated; None where the method trains none.
        plugins: by name, outermost first.
        sources: their files may be opened while the method runs.
        evaluate: metrics of the student on real test data, or None.
        out: run folder, or None to keep nothing.
        seed: of every stream of randomness.
        config: how the run is driven.
        identity: what must not differ when the run is resumed.
        callbacks: called with each event.
    """

    def __init__(
        self,
        method: Method,
        task: Task,
        *,
        teachers: Sequence[Teacher] = (),
        student: nn.Module | None = None,
        plugins: Mapping[str, Plugin] | None = None,
        sources: Mapping[str, Source] | None = None,
        evaluate: Evaluate | None = None,
        out: Path | None = None,
        seed: int = 0,
        config: TrainerConfig | None = None,
        identity: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.method = method
        self.task = task
        self.teachers = list(teachers)
        self.student = student
        self.plugins = dict(plugins or {})
        self.sources = dict(sources or {})
        self.evaluate = evaluate
        self.out = out
        self.seed = seed
        self.config = config or TrainerConfig()
        self.identity = {"seed": seed, "plugins": list(self.plugins), **(identity or {})}
        self.callbacks = list(callbacks)
        self.device = runtime.device(self.config.device)
        self.diagnosis = Diagnosis(task.num_classes)
        self.scores: list[dict[str, float]] = []
        self._store = None if out is None else CheckpointStore(out / "checkpoints")
        self._metrics = MetricsFile(None if out is None else out / "metrics.jsonl")
        self._saved: dict[str, Any] | None = None
        self._samples: list[tuple[Tensor, Tensor]] = []
        self._pending: dict[str, Step] = {}
        self._bad_step: Tensor | None = None
        self._checkpoint_step = 0
        self._number = 0
        self._seconds_before = 0.0
        self._started = 0.0
        self._round_started = 0.0
        self._budget_told = False
        self.ctx = RunContext(
            seed=seed,
            device=self.device,
            plugins=self.plugins,
            reduce=runtime.average_gradients,
            on_loop=self._begin_loop,
            on_round=self._end_round,
        )

    def run(self, *, resume: bool = False) -> Outcome:
        """Drive the method.

        Args:
            resume: go on from the newest sound checkpoint; without one, start from the beginning.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the last checkpoint stands.
            NonFiniteLossError: a loss became NaN or infinite; the last checkpoint stands.
            CheckpointError: the checkpoint is of another run.
        """
        self._open(resume)
        self._started = self._round_started = time.perf_counter()
        seeding.seed_globals(self.seed)
        teachers = self._teacher_weights()
        allowed = tuple(path for source in self.sources.values() for path in source.paths)
        with (
            _interruptible(self._interrupted),
            runtime.threads(self.config.threads),
            guard.watching(type(self.method).__name__, allowed),
        ):
            with guard.pausing():
                for network in self._networks().values():
                    network.to(self.device)
            for name, plugin in self.plugins.items():
                plugin.setup(
                    self.task, self.teachers, self._student(), ScopedContext(self.ctx, name)
                )
            self._check_roles()
            with guard.pausing():
                self._tell("start", resumed=self._saved is not None, step=self._checkpoint_step)
            for step in self.method.run(self.ctx):
                self._after_step(step)
            with guard.pausing():
                findings = self._finish()
            # Outside of the pause: this is the method's own code.
            result = self.method.result()
        if self._teacher_weights() != teachers:
            raise ContractError(
                "a teacher's weights changed during the run, so the student learned from something "
                "else; hand in networks that share no memory"
            )
        return Outcome(
            result,
            self.scores,
            findings,
            self.ctx.progress.steps,
            self._seconds(),
            self._queries(),
            self._latest_samples(),
            complete=not self.ctx.cut_short,
        )

    def _teacher_weights(self) -> list[str]:
        return [fingerprint(teacher) for teacher in self.teachers if isinstance(teacher, nn.Module)]

    def _check_roles(self) -> None:
        """Refuse at once a plug-in that wraps what the method says it never does."""
        requires: Requires | None = getattr(self.method, "requires", None)
        if requires is None or not requires.roles:
            return
        useless = sorted(set(self.plugins) - self.ctx.wrapping(requires.roles))
        if useless:
            raise ContractError(
                f"plug-ins {useless} were not called and never will be: "
                f"{type(self.method).__name__} makes updates of role {', '.join(requires.roles)} "
                "only, and they wrap others; leave them out"
            )

    def _student(self) -> nn.Module:
        if self.student is None:
            raise ContractError("plug-ins need a student, and this method trains none")
        return self.student

    # Between steps

    def _after_step(self, step: Step) -> None:
        if step.loss is not None:
            total = step.loss.total
            if self._bad_step is None:
                self._bad_step = torch.full((), -1, dtype=torch.int64, device=total.device)
            number = torch.full_like(self._bad_step, self.ctx.progress.steps)
            bad = (~torch.isfinite(total)) & (self._bad_step < 0)
            self._bad_step = torch.where(bad, number, self._bad_step)
            self._pending[step.role] = step
            if step.role == "student":
                self.diagnosis.observe(step.loss)
        if self.ctx.progress.steps % self.config.log_every == 0:
            with guard.pausing():
                self._log()
                self._tell("step", step=self.ctx.progress.steps)

    def _log(self) -> None:
        self._check_finite()
        progress = self.ctx.progress
        for role, step in self._pending.items():
            if step.loss is None:
                continue
            self._metrics.add(
                "step",
                step=progress.steps,
                role=role,
                loop=progress.loop,
                round=progress.round,
                seconds=round(self._seconds(), 3),
                terms={name: float(term) for name, term in step.loss.terms.items()},
                total=float(step.loss.total),
            )
        student = self._pending.get("student")
        if student is not None and student.loss is not None and student.loss.inputs is not None:
            teacher = student.loss.teacher
            inputs = student.loss.inputs
            if teacher is not None and teacher.logits.dim() == 2 and isinstance(inputs, Tensor):
                self._keep_samples(inputs, teacher.logits)
        self._pending.clear()

    def _keep_samples(self, inputs: Tensor, logits: Tensor) -> None:
        """Remember some of the latest inputs for the contact sheet, at a bounded size."""
        row = inputs[0].numel() * inputs.element_size()
        rows = max(1, min(_SAMPLE_ROWS, _SAMPLE_BYTES // (_SAMPLE_BATCHES * row)))
        # Copies: a slice would keep the whole batch alive.
        self._samples.append((inputs[:rows].clone(), logits[:rows].argmax(1)))
        del self._samples[:-_SAMPLE_BATCHES]

    def _check_finite(self) -> None:
        if self._bad_step is None or int(self._bad_step) < 0:
            return
        number = int(self._bad_step)
        raise NonFiniteLossError(
            f"the loss became NaN or infinite at step {number}, expected a finite one; lower the "
            f"learning rates or set a gradient clip. The last checkpoint, at step "
            f"{self._checkpoint_step}, is kept"
        )

    def _check_weights(self) -> None:
        """A finite loss may break weights in its last update; such a state is not kept."""
        for name, network in self._networks().items():
            for key, values in network.state_dict().items():
                if isinstance(values, Tensor) and not torch.isfinite(values).all():
                    raise NonFiniteLossError(
                        f"{key!r} of {name!r} became NaN or infinite by step "
                        f"{self.ctx.progress.steps}, expected finite values; lower the learning "
                        "rates or set a gradient clip. The last checkpoint, at step "
                        f"{self._checkpoint_step}, is kept"
                    )

    # Between rounds

    def _begin_loop(self, name: str, n: int) -> int:
        with guard.pausing():
            self._round_started = time.perf_counter()
            if self._saved is None:
                if self._number == 0 and self._store is not None:
                    self._checkpoint()
                return 0
            position = self._saved["context"]["progress"]
            if name in position["finished"]:
                self._restore(complete=False)
                self.ctx.rounds_done[name] = int(position["finished"][name])
                return n
            if name != position["loop"]:
                raise CheckpointError(
                    f"the checkpoint stands in loop {position['loop']!r}, and the run began loop "
                    f"{name!r}; it is of another method or version. Start again without --resume"
                )
            done = int(position["round"])
            self._restore(complete=done < n)
            self._saved = None
            # A budget that was spent before the run was resumed is spent.
            self.ctx.stopping = self._out_of_budget()
            return done

    def _end_round(self) -> bool:
        with guard.pausing():
            progress = self.ctx.progress
            self._log()
            self._check_plugins()
            last = progress.round == progress.rounds
            record = self.diagnosis.end_round(self.student)
            if record is not None:
                self._metrics.add(
                    "round",
                    loop=progress.loop,
                    round=progress.round,
                    step=progress.steps,
                    seconds=round(self._seconds(), 3),
                    agreement=record.agreement,
                    classes=record.classes,
                    train_eval_agreement=record.train_eval_agreement,
                )
            stop = self._out_of_budget()
            if last or stop or progress.round % self.config.evaluate_every == 0:
                self._evaluate()
            self._number += 1
            # Rows first: those beyond the checkpoint go on resume, missing ones would stay missing.
            self._metrics.flush()
            if last or stop or progress.round % self.config.checkpoint_every == 0:
                self._checkpoint()
            self._tell(
                "round",
                loop=progress.loop,
                round=progress.round,
                rounds=progress.rounds,
                step=progress.steps,
                seconds=self._seconds(),
            )
            self._round_started = time.perf_counter()
            return not stop

    def _check_plugins(self) -> None:
        uncalled = self.ctx.uncalled()
        if uncalled:
            raise ContractError(
                f"plug-ins {uncalled} were not called in a round with updates that they wrap; "
                f"{type(self.method).__name__} does not route these through ctx.update"
            )

    def _judged(self) -> nn.Module | None:
        """What the user gets, if it is a network; else the student."""
        found = self.method.result().object
        return found if isinstance(found, nn.Module) else self.student

    def _evaluate(self) -> None:
        network = None if self.evaluate is None else self._judged()
        if self.evaluate is None or network is None:
            return
        progress = self.ctx.progress
        with seeding.preserved():
            saved = modes.flags(network)
            scores = dict(self.evaluate(network))
            modes.set_flags(network, saved)
        self.scores.append({"step": progress.steps, **scores})
        self._metrics.add("evaluation", step=progress.steps, round=progress.round, scores=scores)
        self._tell("evaluation", step=progress.steps, scores=scores)

    def _out_of_budget(self) -> bool:
        progress, minutes = self.ctx.progress, self.config.minutes
        if self.config.max_steps is not None and progress.steps >= self.config.max_steps:
            return True
        if minutes is None:
            return False
        left = minutes * 60 - self._seconds()
        round_seconds = time.perf_counter() - self._round_started
        missing = progress.rounds - progress.round
        fitting = max(0, int(left / max(round_seconds, 1e-9)))
        if fitting < missing and not self._budget_told:
            self._budget_told = True
            self._warn(
                f"the budget of {minutes:g} minutes is enough for about {progress.round + fitting} "
                f"of {progress.rounds} rounds of {progress.loop!r}; schedules are not shortened, "
                "so set fewer rounds if the learning rate should decay in time"
            )
        return left <= 0

    def _finish(self) -> list[Finding]:
        self._log()
        if self._saved is not None:
            raise CheckpointError("the run ended before it reached the loop of its checkpoint")
        uncalled = sorted(set(self.plugins) - self.ctx.called)
        if uncalled:
            raise ContractError(
                f"plug-ins {uncalled} were never called; {type(self.method).__name__} makes no "
                "update that they could wrap"
            )
        if not self.scores or self.scores[-1]["step"] != self.ctx.progress.steps:
            self._evaluate()
        self._metrics.flush()
        for network in (self.student, self._judged()):
            if network is not None:
                network.eval()
        settings = getattr(self.method, "Config", None)
        findings = self.diagnosis.findings(getattr(settings, "model_fields", None))
        for finding in findings:
            self._warn(f"{finding.message}: {finding.knob}")
        self._tell("end", step=self.ctx.progress.steps, seconds=self._seconds())
        return findings

    def _latest_samples(self) -> tuple[Tensor, Tensor] | None:
        if not self._samples:
            return None
        inputs, classes = zip(*self._samples, strict=True)
        # Those of an earlier part of the run were read back to the CPU.
        return torch.cat([x.cpu() for x in inputs]), torch.cat([x.cpu() for x in classes])

    # State

    def _open(self, resume: bool) -> None:
        if self._store is None:
            return
        if not resume:
            self._store.clear()
            self._metrics.restart(0)
            return
        self._saved = self._store.load()
        if self._saved is None:
            self._metrics.restart(0)
            return
        changed = sorted(
            key
            for key in {*self.identity, *self._saved["identity"]}
            if self.identity.get(key) != self._saved["identity"].get(key)
        )
        if changed:
            raise CheckpointError(
                f"the run in {self.out} was started with other settings ({', '.join(changed)}); "
                "resume with the recipe it was started with, or start in a new folder"
            )
        self._number = int(self._saved["number"])
        self._seconds_before = float(self._saved["seconds"])
        self._checkpoint_step = int(self._saved["context"]["progress"]["steps"])
        self._metrics.restart(int(self._saved["rows"]))

    def _all_parts(self) -> Iterator[tuple[str, Any]]:
        for name, part in self.method.parts().items():
            yield f"method.{name}", part
        for plugin_name, plugin in self.plugins.items():
            for name, part in plugin.parts().items():
                yield f"plugin.{plugin_name}.{name}", part
        for index, teacher in enumerate(self.teachers):
            if isinstance(teacher, Stateful) and not isinstance(teacher, nn.Module):
                yield f"teacher.{index}", teacher

    def _networks(self) -> dict[str, nn.Module]:
        """Parts that are modules, and the modules that other parts hold."""
        found: dict[str, nn.Module] = {}
        for name, part in self._all_parts():
            if isinstance(part, nn.Module):
                found[name] = part
            elif isinstance(part, HoldsNetworks):
                found |= {f"{name}/{key}": net for key, net in part.networks().items()}
        return found

    def _checkpoint(self) -> None:
        if self._store is None:
            return
        parts = dict(self._all_parts())
        self._check_weights()
        state = {
            "identity": self.identity,
            "number": self._number,
            "seconds": self._seconds(),
            "context": self.ctx.state(),
            "parts": {n: p.state_dict() for n, p in parts.items() if isinstance(p, Stateful)},
            "flags": {name: modes.flags(net) for name, net in self._networks().items()},
            "globals": seeding.global_state(),
            "diagnosis": self.diagnosis.state_dict(),
            "scores": self.scores,
            "queries": [getattr(teacher, "queries", 0) for teacher in self.teachers],
            "samples": self._samples,
            "rows": self._metrics.rows,
        }
        growing = {name: part for name, part in parts.items() if isinstance(part, Sharded)}
        self._store.save(self._number, state, growing)
        self._checkpoint_step = self.ctx.progress.steps

    def _restore(self, *, complete: bool) -> None:
        saved, store = self._saved, self._store
        if saved is None or store is None:
            return
        parts = dict(self._all_parts())
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
        for name, network in self._networks().items():
            if name in saved["flags"]:
                modes.set_flags(network, saved["flags"][name])
        for teacher, queries in zip(self.teachers, saved["queries"], strict=True):
            if hasattr(teacher, "queries"):
                teacher.queries = queries
        self.diagnosis.load_state_dict(saved["diagnosis"])
        self.scores[:] = saved["scores"]
        self._samples = saved["samples"]
        self.ctx.restore(saved["context"], complete=complete)
        # Last, because loading may draw: from here on the run draws what it would have drawn.
        seeding.set_global_state(saved["globals"])

    # Helpers

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def _queries(self) -> int:
        return sum(int(getattr(teacher, "queries", 0)) for teacher in self.teachers)

    def _warn(self, message: str) -> None:
        logger.warning(message)
        self._tell("warning", message=message)

    def _tell(self, kind: str, **data: Any) -> None:
        if self.callbacks:
            with seeding.preserved():
                for callback in self.callbacks:
                    callback(Event(kind, data))

    def _interrupted(self) -> Interrupted:
        repeated = self.ctx.progress.steps - self._checkpoint_step
        if self._store is None:
            return Interrupted("stopped; nothing was kept, because the run has no folder")
        return Interrupted(
            f"stopped at step {self.ctx.progress.steps}; --resume goes on from step "
            f"{self._checkpoint_step}, so {repeated} steps will be repeated"
        )


@contextmanager
def _interruptible(message: Callable[[], Interrupted]) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into `Interrupted`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise message() from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
