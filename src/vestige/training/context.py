"""What a method sees of the trainer: loops, optimizers, updates and randomness."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vestige.core import seeding
from vestige.core.protocols import (
    LossFn,
    OptimizerFactory,
    Plugin,
    Progress,
    SourceTerms,
    StudentBatch,
    StudentGradient,
    StudentOptimizers,
    StudentUpdate,
)
from vestige.core.schedules import Schedule
from vestige.core.types import Batch, Loss, Prediction, Role, Step
from vestige.errors import CheckpointError, ContractError


@dataclass
class _Scheduled:
    """A persistent optimizer with its base rates and the number of steps it took."""

    optimizer: Optimizer
    schedule: Schedule | None
    base_rates: list[float]
    steps: int = 0

    def set_rates(self, share: float) -> None:
        if self.schedule is not None:
            factor = self.schedule.factor(share)
            for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
                group["lr"] = rate * factor

    def stepped(self) -> None:
        self.steps += 1
        if self.schedule is not None and self.schedule.per == "step":
            self.set_rates(self.steps / self.schedule.steps)


class RunContext:
    """The Context of `core.protocols`, for one process.

    Args:
        seed: of the run; every stream of randomness derives from it.
        device: where `rng` lives.
        plugins: by name, outermost first.
        reduce: averages gradients over processes, called after the plug-ins.
        on_loop: called when a loop draws its first item, with its name and length; returns the
            number of rounds that are done already.
        on_round: called after each finished round; returns whether to go on.
    """

    def __init__(
        self,
        *,
        seed: int,
        device: torch.device,
        plugins: Mapping[str, Plugin],
        reduce: Callable[[Sequence[nn.Parameter]], None],
        on_loop: Callable[[str, int], int],
        on_round: Callable[[], bool],
    ) -> None:
        self.seed = seed
        self.device = device
        self.progress = Progress()
        self.rng = seeding.generator(seed, "method", device)
        self.plugins = dict(plugins)
        self.in_round = False
        self.stopping = False
        self.cut_short = False
        self.called: set[str] = set()
        self.roles: set[Role] = set()
        self._generators: dict[str, torch.Generator] = {}
        self._optimizers: dict[str, _Scheduled] = {}
        self._saved_optimizers: dict[str, Any] = {}
        self._saved_generators: dict[str, Tensor] = {}
        self._hooks: dict[type[Any], list[tuple[str, Any]]] = {
            hook: [(name, plugin) for name, plugin in plugins.items() if isinstance(plugin, hook)]
            for hook in (SourceTerms, StudentBatch, StudentGradient, StudentOptimizers)
        }
        self._reduce = reduce
        self._on_loop = on_loop
        self._on_round = on_round

    # Loops

    def rounds(self, name: str, n: int) -> Iterator[int]:
        """The named loop's round numbers; skips what a resumed run has done already.

        State is restored when the first item is drawn. At a round's end the trainer logs,
        evaluates, checkpoints and decides whether to go on.
        """
        if self.in_round:
            raise ContractError(
                f"loop {name!r} began inside a round of {self.progress.loop!r}; rounds do not "
                "nest, use a plain for loop inside a round"
            )
        if name in self.progress.finished or name == self.progress.loop:
            raise ContractError(f"loop {name!r} was run before; give every loop its own name")
        if n < 1:
            raise ContractError(f"loop {name!r} got n={n}, expected at least 1 round")
        if self.progress.loop:
            self.progress.finished[self.progress.loop] = self.progress.round
        self.progress.loop, self.progress.round, self.progress.rounds = name, 0, n
        done = self._on_loop(name, n)
        self.progress.round = done
        for entry in self._optimizers.values():
            if entry.schedule is not None and entry.schedule.per == "round":
                entry.set_rates(self.progress.fraction)
        for index in range(done, n):
            if self.stopping:
                self.cut_short = True
                break
            self.in_round = True
            try:
                yield index
            finally:
                # Also when the method leaves the loop by break.
                self.in_round = False
            self.progress.round = index + 1
            for entry in self._optimizers.values():
                if entry.schedule is not None and entry.schedule.per == "round":
                    entry.set_rates(self.progress.fraction)
            self.stopping = not self._on_round()

    # Randomness

    def generator(self, name: str) -> torch.Generator:
        """A stream of its own; the same name gives the same generator."""
        if name not in self._generators:
            made = seeding.generator(self.seed, f"named/{name}", self.device)
            if name in self._saved_generators:
                made.set_state(self._saved_generators[name])
            self._generators[name] = made
        return self._generators[name]

    # Optimizers

    def optimizer(
        self,
        name: str,
        params: Iterable[nn.Parameter],
        factory: OptimizerFactory,
        schedule: Schedule | None = None,
        *,
        fresh: bool = False,
    ) -> Optimizer:
        """An optimizer over `params`; persistent ones must be asked for outside of a round."""
        optimizer = factory(list(params))
        if fresh:
            if schedule is not None:
                raise ContractError(
                    f"optimizer {name!r} is fresh and lives within a round; no schedule"
                )
            return optimizer
        if self.in_round:
            raise ContractError(
                f"optimizer {name!r} was asked for inside a round, expected before the loop; pass "
                "fresh=True if it is meant to live within the round only"
            )
        if name in self._optimizers:
            raise ContractError(
                f"optimizer {name!r} exists already; give every optimizer its own name"
            )
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        entry = self._optimizers[name] = _Scheduled(optimizer, schedule, rates)
        if name in self._saved_optimizers:
            self._restore_optimizer(name)
        elif schedule is not None:
            entry.set_rates(0.0)
        return optimizer

    # Updates

    def update(
        self,
        role: Role,
        model: nn.Module,
        loss_fn: LossFn,
        batch: Batch,
        *optimizers: Optimizer,
        clip: float | None = None,
        accumulate: int = 1,
    ) -> Step:
        """One optimizer step on `loss_fn(model, batch)`.

        Without plug-ins: zero, backward to the parameters of `optimizers` alone, reduce over
        processes, clip, step.

        Args:
            role: "source" and "student" are open to plug-ins, "auxiliary" is not.
            model: what the loss is evaluated on.
            loss_fn: returns `Loss`; pure for role "student".
            batch: handed to `loss_fn`.
            optimizers: own the parameters that move.
            clip: largest norm of the gradient over all of these parameters.
            accumulate: number of equal slices of the batch whose gradients are summed; BatchNorm
                then sees each slice on its own.
        """
        if role == "student":
            for name, plugin in self._hooks[StudentBatch]:
                batch = plugin.student_batch(batch)
                self.called.add(name)
            for name, plugin in self._hooks[StudentOptimizers]:
                optimizers = tuple(plugin.student_optimizers(optimizers))
                self.called.add(name)
        params = self._params(optimizers)
        self._took(role)
        if role == "student" and len(batch) == 0:
            return Step(role)
        for parameter in params:
            parameter.grad = None

        def plain() -> Loss:
            return self._backward(role, model, loss_fn, batch, params, accumulate)

        chain = plain
        if role == "student" and self._hooks[StudentGradient]:
            names = {id(p): n for n, p in model.named_parameters()}
            named = {names.get(id(p), f"#{i}"): p for i, p in enumerate(params)}
            context = StudentUpdate(model, loss_fn, batch, named)
            for name, plugin in reversed(self._hooks[StudentGradient]):
                chain = self._wrapped(name, plugin, context, chain)
        loss = chain().detach()
        self._step(params, optimizers, clip)
        return Step(role, loss)

    def apply(
        self, role: Role, grads: Mapping[nn.Parameter, Tensor], *optimizers: Optimizer
    ) -> Step:
        """One optimizer step on gradients that the paper forms itself, keyed by parameter."""
        params = self._params(optimizers)
        strange = [p for p in grads if not any(p is q for q in params)]
        if strange:
            raise ContractError(
                f"got gradients for {len(strange)} parameters that none of the optimizers holds"
            )
        for parameter in params:
            parameter.grad = None
        for parameter, grad in grads.items():
            parameter.grad = grad.detach()
        self._took(role)
        self._step(params, optimizers, None)
        return Step(role)

    def _took(self, role: Role) -> None:
        # A misspelt role would silently escape every plug-in.
        if role not in get_args(Role):
            raise ContractError(f"got role {role!r}, expected one of {', '.join(get_args(Role))}")
        self.roles.add(role)

    def _backward(
        self,
        role: Role,
        model: nn.Module,
        loss_fn: LossFn,
        batch: Batch,
        params: list[nn.Parameter],
        accumulate: int,
    ) -> Loss:
        if accumulate == 1:
            loss = self._evaluate(role, model, loss_fn, batch)
            loss.total.backward(inputs=params)
            return loss.detach()
        size = len(batch)
        if not 1 <= accumulate <= size:
            raise ContractError(f"got accumulate={accumulate} for a batch of {size} rows")
        parts = []
        for rows in torch.arange(size).chunk(accumulate):
            part = batch.rows(slice(int(rows[0]), int(rows[-1]) + 1))
            loss = self._evaluate(role, model, loss_fn, part)
            share = len(rows) / size
            (loss.total * share).backward(inputs=params)
            parts.append((share, loss.detach()))
        return _joined(parts)

    def _evaluate(self, role: Role, model: nn.Module, loss_fn: LossFn, batch: Batch) -> Loss:
        loss = loss_fn(model, batch)
        if batch.weights is not None and not batch.weights_were_used:
            raise ContractError(
                "a plug-in set weights on the batch and the loss did not use them; reduce "
                "per-sample losses by batch.mean(...)"
            )
        if role == "source":
            for name, plugin in self._hooks[SourceTerms]:
                loss = loss.plus(plugin.source_terms(loss, batch))
                self.called.add(name)
        return loss

    def _wrapped(
        self,
        name: str,
        plugin: StudentGradient,
        context: StudentUpdate,
        following: Callable[[], Loss],
    ) -> Callable[[], Loss]:
        def call() -> Loss:
            self.called.add(name)
            return plugin.student_gradient(context, following)

        return call

    def _step(
        self, params: list[nn.Parameter], optimizers: Sequence[Optimizer], clip: float | None
    ) -> None:
        self._reduce(params)
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        for optimizer in optimizers:
            optimizer.step()
            for entry in self._optimizers.values():
                if entry.optimizer is optimizer:
                    entry.stepped()
        # Gradients are not needed between steps; keeping them would double a net's memory.
        for parameter in params:
            parameter.grad = None
        self.progress.steps += 1

    @staticmethod
    def _params(optimizers: Sequence[Optimizer]) -> list[nn.Parameter]:
        if not optimizers:
            raise ContractError("an update got no optimizer; name the one that owns what moves")
        seen: dict[int, nn.Parameter] = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.requires_grad:
                        seen[id(parameter)] = parameter
        return list(seen.values())

    # State

    def state(self) -> dict[str, Any]:
        """Optimizers, generators and positions, for a checkpoint."""
        return {
            "progress": {
                "loop": self.progress.loop,
                "round": self.progress.round,
                "rounds": self.progress.rounds,
                "steps": self.progress.steps,
                "finished": dict(self.progress.finished),
            },
            "rng": self.rng.get_state(),
            "generators": {name: made.get_state() for name, made in self._generators.items()},
            "optimizers": {
                name: {"steps": entry.steps, "state": entry.optimizer.state_dict()}
                for name, entry in self._optimizers.items()
            },
            "called": sorted(self.called),
        }

    def restore(self, state: Mapping[str, Any], *, complete: bool) -> None:
        """Take over randomness, optimizers and counts.

        Args:
            state: what `state` returned.
            complete: whether every saved optimizer must exist by now; an optimizer that is made
                later takes its state over when it is asked for.
        """
        self.progress.steps = int(state["progress"]["steps"])
        self.rng.set_state(state["rng"])
        self._saved_generators = dict(state["generators"])
        for name, made in self._generators.items():
            if name in self._saved_generators:
                made.set_state(self._saved_generators[name])
        self._saved_optimizers = dict(state["optimizers"])
        self.called = set(state["called"])
        for name in self._optimizers:
            if name in self._saved_optimizers:
                self._restore_optimizer(name)
        missing = sorted(set(self._saved_optimizers) - set(self._optimizers))
        if complete and missing:
            raise CheckpointError(
                f"the checkpoint holds optimizers {missing} that this run does not ask for; it is "
                "of another method or version"
            )

    def _restore_optimizer(self, name: str) -> None:
        saved, entry = self._saved_optimizers[name], self._optimizers[name]
        try:
            entry.optimizer.load_state_dict(saved["state"])
        except ValueError as error:
            raise CheckpointError(
                f"optimizer {name!r} does not fit the checkpoint: {error}"
            ) from error
        entry.steps = int(saved["steps"])


def _joined(parts: Sequence[tuple[float, Loss]]) -> Loss:
    """One loss for the slices of an accumulated batch: weighted means, rows in order."""

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack(
            [share * value for (share, _), value in zip(parts, values, strict=True)]
        ).sum()

    losses = [loss for _, loss in parts]
    terms = {name: mean(loss.terms[name] for loss in losses) for name in losses[0].terms}

    def rows(values: Sequence[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.cat(present) if len(present) == len(losses) else None

    teacher = rows([None if loss.teacher is None else loss.teacher.logits for loss in losses])
    student = rows([None if loss.student is None else loss.student.logits for loss in losses])
    return Loss(
        terms,
        mean(loss.total for loss in losses),
        rows([loss.inputs for loss in losses]),
        None if teacher is None else Prediction(teacher),
        None if student is None else Prediction(student),
    )
