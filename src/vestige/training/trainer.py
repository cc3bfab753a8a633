"""Drive a method: between two of its steps log, evaluate, checkpoint, watch the budget."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vestige.core import modes, parallel, seeding
from vestige.core.protocols import Method, Plugin, Source, Task, Teacher
from vestige.core.types import Step
from vestige.errors import (
    CheckpointError,
    ContractError,
    Interrupted,
    QueryBudgetExceeded,
    RecipeError,
    TeacherError,
)
from vestige.models.probes import batchnorm_layers
from vestige.teachers.loading import fingerprint
from vestige.training import compute, guard, runtime
from vestige.training.budget import Budget
from vestige.training.context import RunContext, ScopedContext
from vestige.training.diagnosis import Finding
from vestige.training.interrupts import interruptible
from vestige.training.outcome import Outcome
from vestige.training.parts import networks_of, run_parts
from vestige.training.run_state import RunState
from vestige.training.tracking import Callback
from vestige.training.tracking.audience import Audience
from vestige.training.trainer_config import TrainerConfig
from vestige.training.watch import Watch

Evaluate = Callable[[nn.Module], Mapping[str, float]]


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
        noticed: what was found before the run; told at its start and kept with its findings.
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
        noticed: Sequence[Finding] = (),
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
        self.noticed = list(noticed)
        self.device = runtime.device(self.config.device)
        if self.config.compile and parallel.world() > 1:
            raise RecipeError(
                f"trainer.compile: got true for {parallel.world()} processes, expected false; "
                "compiled BatchNorm would see the rows of one process only"
            )
        self.watch = Watch(task)
        self.ctx = RunContext(
            seed=seed,
            device=self.device,
            plugins=self.plugins,
            reduce=runtime.average_gradients,
            on_loop=self._begin_loop,
            on_round=self._end_round,
        )
        self.audience = Audience(out, self.config, self.identity, self.callbacks)
        self.trackers = self.audience.trackers
        self.budget = Budget(
            self.ctx.progress,
            minutes=self.config.minutes,
            max_steps=self.config.max_steps,
            warn=self._warn,
        )
        self.state = RunState(
            out,
            self.identity,
            parts=self.parts,
            teachers=self.teachers,
            ctx=self.ctx,
            watch=self.watch,
            budget=self.budget,
            metrics=self.audience.metrics,
        )
        self._stop_asked = False
        self._compute = compute.Compute(
            self.device,
            precision=self.config.precision,
            compile=self.config.compile,
            channels_last=self.config.channels_last,
            fold_teacher=self.config.fold_teacher,
        )

    def parts(self) -> dict[str, Any]:
        """Everything of the run with state, by name."""
        return run_parts(self.method, self.plugins, self.teachers, self.sources)

    def run(self, *, resume: bool = False) -> Outcome:
        """Drive the method.

        Args:
            resume: go on from the newest sound checkpoint; without one, start from the beginning.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the last checkpoint stands.
            NonFiniteLossError: a loss became NaN or infinite; the last checkpoint stands.
            CheckpointError: the checkpoint is of another run.
        """
        if self.device.type == "cpu":
            runtime.keep_memory()
        self.state.open(resume=resume)
        self.budget.start()
        seeding.seed_globals(self.seed)
        teachers = self._teacher_weights()
        if any(parallel.differs(int(weights[:14], 16)) for weights in teachers):
            raise TeacherError(
                f"the {parallel.world()} processes got teachers with different weights, expected "
                "one; load them from a file or seed torch before they are made"
            )
        allowed = tuple(path for source in self.sources.values() for path in source.paths)
        with (
            self.trackers,
            interruptible(self._interrupted, self._ask_to_stop),
            runtime.threads(self.config.threads),
            guard.watching(type(self.method).__name__, allowed),
            self._computing(),
        ):
            for name, plugin in self.plugins.items():
                plugin.setup(
                    self.task, self.teachers, self._student(), ScopedContext(self.ctx, name)
                )
            self.ctx.hooks.check_roles(self.method)
            with self._aside():
                resumed = self.state.saved is not None
                self.audience.tell("start", resumed=resumed, step=self.state.step)
                for finding in self.noticed:
                    self._warn(f"{finding.message}: {finding.knob}")
                self.trackers.start(resumed=resumed)
            try:
                for step in self.method.run(self.ctx):
                    self._after_step(step)
            except QueryBudgetExceeded as error:
                raise QueryBudgetExceeded(f"{error}{self.state.kept()}") from error
            with self._aside():
                findings = self._finish()
                retention = self._retention()
            # Outside of the pause: this is the method's own code.
            result = self.method.result()
        if self._teacher_weights() != teachers:
            raise ContractError(
                "a teacher's weights changed during the run, so the student learned from something "
                "else; hand in networks that share no memory"
            )
        return Outcome(
            result,
            self.watch.scores,
            findings,
            self.ctx.progress.steps,
            self.budget.seconds(),
            sum(int(getattr(teacher, "queries", 0)) for teacher in self.teachers),
            self.watch.latest_samples(),
            complete=not self.ctx.cut_short,
            moments=self.watch.moments.chosen(),
            retention=retention,
            teacher_gradients=sum(int(getattr(one, "gradients", 0)) for one in self.teachers),
            images_made=self.watch.made.count(self.method.parts()),
            coverage=self.watch.diagnosis.coverage(),
        )

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Networks are on the device and compute as configured; faults of memory are told."""
        with guard.pausing():
            networks = networks_of(self.parts())
            for network in networks.values():
                network.to(self.device)
                # A student that the user made is not the same in every process by itself.
                parallel.share(network.state_dict().values())
        with (
            self._compute.prepared(networks, self.teachers),
            compute.faults(self._doing, self._less_memory),
        ):
            yield

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """The trainer's own work, between steps: files may be opened, precision is full."""
        with guard.pausing(), self._compute.aside():
            yield

    def _doing(self) -> str:
        progress, role = self.ctx.progress, self.ctx.updating
        if role is None:
            return f"loop {progress.loop!r} after step {progress.steps}, outside of updates"
        return f"the {role} update of step {progress.steps + 1} in loop {progress.loop!r}"

    def _less_memory(self) -> str:
        fields = getattr(getattr(self.method, "Config", None), "model_fields", {})
        return compute.less_memory(fields, self.config.precision) + self.state.kept()

    def _teacher_weights(self) -> list[str]:
        return [fingerprint(teacher) for teacher in self.teachers if isinstance(teacher, nn.Module)]

    def _student(self) -> nn.Module:
        if self.student is None:
            raise ContractError("plug-ins need a student, and this method trains none")
        return self.student

    # Between steps

    def _after_step(self, step: Step) -> None:
        if parallel.anywhere(self._stop_asked):
            raise KeyboardInterrupt
        self.ctx.updating = None
        self.watch.observe(step, self.ctx.progress.steps)
        if self.ctx.progress.steps % self.config.log_every == 0:
            with self._aside():
                self.audience.tell("step", terms=self._log(), step=self.ctx.progress.steps)

    def _log(self) -> dict[str, dict[str, float]]:
        """Write what is new into the curves; returns the loss terms by role."""
        return self.watch.log(
            self.audience.metrics, self.ctx.progress, self.budget.seconds(), self.state.step
        )

    # Between rounds

    def _begin_loop(self, name: str, n: int) -> int:
        with self._aside():
            self.budget.start_round()
            return self.state.begin_loop(name, n)

    def _end_round(self) -> bool:
        progress, metrics = self.ctx.progress, self.audience.metrics
        with self._aside():
            self._log()
            self.ctx.hooks.check_round(self.method)
            record = self.watch.end_round(self.student, metrics, progress, self.budget.seconds())
            stop = self.budget.spent()
            last = stop or progress.round == progress.rounds
            if last or progress.round % self.config.evaluate_every == 0:
                self._evaluate()
            self.state.number += 1
            # Rows first: those beyond the checkpoint go on resume, missing ones would stay missing.
            metrics.flush()
            if last or progress.round % self.config.checkpoint_every == 0:
                self.state.checkpoint()
            self.audience.tell(
                "round",
                loop=progress.loop,
                round=progress.round,
                rounds=progress.rounds,
                step=progress.steps,
                seconds=self.budget.seconds(),
                agreement=None if record is None else record.agreement,
            )
            self.budget.start_round()
            return not stop

    def _judged(self) -> nn.Module | None:
        """What the user gets, if it is a network; else the student, unless it gets none."""
        found = self.method.result()
        if isinstance(found.object, nn.Module):
            return found.object
        return None if found.kind in ("pool", "texts") else self.student

    def _evaluate(self) -> None:
        network = None if self.evaluate is None else self._judged()
        if self.evaluate is None or network is None:
            return
        progress = self.ctx.progress
        with seeding.preserved(), compute.faults(self._judging, self._smaller_evaluation):
            saved = modes.flags(network)
            scores = dict(self.evaluate(network))
            # By each process, since metrics may talk to the others; rounding must not part them.
            scores = parallel.first(partial(dict, scores))
            modes.set_flags(network, saved)
        self.watch.scores.append({"step": progress.steps, **scores})
        self.audience.metrics.add(
            "evaluation",
            step=progress.steps,
            round=progress.round,
            student_steps=self.watch.student_steps,
            seconds=round(self.budget.seconds(), 3),
            scores=scores,
        )
        if self.trackers:
            self.trackers.picture(progress.steps, self.task.spec, self.watch.latest_samples())
        self.audience.tell(
            "evaluation", step=progress.steps, scores=scores, metric=self.task.metric
        )

    def _judging(self) -> str:
        return f"the evaluation after step {self.ctx.progress.steps}"

    def _smaller_evaluation(self) -> str:
        return f"evaluate on fewer inputs or in smaller batches{self.state.kept()}"

    def _finish(self) -> list[Finding]:
        self._log()
        if self.state.saved is not None:
            raise CheckpointError("the run ended before it reached the loop of its checkpoint")
        self.ctx.hooks.check_run(self.method)
        if not self.watch.scores or self.watch.scores[-1]["step"] != self.ctx.progress.steps:
            self._evaluate()
        self.audience.metrics.flush()
        for network in (self.student, self._judged()):
            if network is not None:
                network.eval()
        findings = self.watch.diagnosis.findings(self._knobs())
        for finding in findings:
            self._warn(f"{finding.message}: {finding.knob}")
        findings = [*self.noticed, *findings]
        self.audience.tell("end", step=self.ctx.progress.steps, seconds=self.budget.seconds())
        return findings

    def _knobs(self) -> set[str] | None:
        """Names of the settings that could be turned; None where the method tells none."""
        fields = getattr(getattr(self.method, "Config", None), "model_fields", None)
        if fields is None:
            return None
        networks = [one for one in self.teachers if isinstance(one, nn.Module)]
        # Without statistics there is nothing that their weight could hold inputs to.
        return {*fields} - (set() if any(map(batchnorm_layers, networks)) else {"bn_weight"})

    def _retention(self) -> dict[str, float] | None:
        return None if self.student is None else self.watch.retention.figures(self.student)

    # Helpers

    def _warn(self, message: str) -> None:
        self.audience.warn(self.ctx.progress.steps, message)

    def _ask_to_stop(self) -> bool:
        """Take note of a signal; False where it may stop the run at once.

        Of several processes none may leave while the others wait for it, so they stop together
        after a step.
        """
        self._stop_asked = parallel.world() > 1
        return self._stop_asked

    def _interrupted(self) -> Interrupted:
        repeated = self.ctx.progress.steps - self.state.step
        if self.out is None:
            return Interrupted("stopped; nothing was kept, because the run has no folder")
        return Interrupted(
            f"stopped at step {self.ctx.progress.steps}; --resume goes on from step "
            f"{self.state.step}, so {repeated} steps will be repeated"
        )
