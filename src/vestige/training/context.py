"""What a method sees of the trainer: loops, optimizers, updates and randomness."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce as fold
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vestige.core import seeding
from vestige.core.protocols import (
    Following,
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
from vestige.core.types import Batch, Inputs, Loss, Prediction, Role, Step, join_rows
from vestige.errors import CheckpointError, ContractError

_WRAPPED: Mapping[type[Any], Role] = {
    SourceTerms: "source",
    StudentBatch: "student",
    StudentGradient: "student",
    StudentOptimizers: "student",
}


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
        self.rounds_done: dict[str, int] = {}
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
        self.progress.round_steps = 0
        done = self._on_loop(name, n)
        # A skipped loop may have been left early; then it has fewer rounds than it asked for.
        self.progress.round = self.rounds_done.get(name, done)
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
            self.progress.steps_per_round = self.progress.round_steps
            self.progress.round_steps = 0
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
            accumulate: number of slices of the batch, at most its rows, whose gradients are added
                by their share of the rows; BatchNorm sees each slice on its own.
        """
        self._took(role)
        if role == "student":
            if len(batch) == 0:
                raise ContractError(
                    "a student update got an empty batch; put what the student sees into "
                    "batch.inputs, so that plug-ins can weight it, drop rows and evaluate elsewhere"
                )
            for name, plugin in self._hooks[StudentBatch]:
                batch = plugin.student_batch(batch)
                self.called.add(name)
            optimizers, clip = self._student_optimizers(model, optimizers, clip)
            if len(batch) == 0:
                return Step(role)
        params = self._params(optimizers)

        def plain(on: Batch | None = None) -> Loss:
            for parameter in params:
                parameter.grad = None
            return self._backward(
                role, model, loss_fn, batch if on is None else on, params, accumulate
            )

        chain: Following = plain
        if role == "student" and self._hooks[StudentGradient]:
            names = {id(p): n for n, p in model.named_parameters()}
            named = {names[id(p)]: p for p in params if id(p) in names}
            context = StudentUpdate(model, loss_fn, batch, named)
            for name, plugin in reversed(self._hooks[StudentGradient]):
                chain = self._wrapped(name, plugin, context, chain)
        loss = chain().detach()
        if all(parameter.grad is None for parameter in params):
            raise ContractError(
                f"a {role} update reached none of its {len(params)} parameters; the loss does not "
                "depend on what the optimizers own"
            )
        self._step(params, optimizers, clip)
        return Step(role, loss)

    def apply(
        self,
        role: Role,
        grads: Mapping[nn.Parameter, Tensor],
        *optimizers: Optimizer,
        loss: Loss | None = None,
    ) -> Step:
        """One optimizer step on gradients that the paper forms itself, keyed by parameter.

        Args:
            role: as for `update`; plug-ins do not wrap it.
            grads: of some or all parameters of `optimizers`; the others stay.
            optimizers: own the parameters that move.
            loss: what is written into the curves and checked for NaN.
        """
        params = self._params(optimizers)
        owned = {id(parameter) for parameter in params}
        strange = [p for p in grads if id(p) not in owned]
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
        return Step(role, None if loss is None else loss.detach())

    def wrapping(self, roles: Collection[Role]) -> set[str]:
        """Plug-ins that wrap updates of one of these roles."""
        return {
            name
            for hook, role in _WRAPPED.items()
            if role in roles
            for name, _ in self._hooks[hook]
        }

    def uncalled(self) -> list[str]:
        """Plug-ins that were not called although an update of a role that they wrap took place."""
        return sorted(self.wrapping(self.roles) - self.called)

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
        if accumulate < 1 or size == 0:
            raise ContractError(f"got accumulate={accumulate} for a batch of {size} rows")
        parts = []
        # A plug-in may have left fewer rows than slices were asked for.
        for rows in torch.arange(size).chunk(min(accumulate, size)):
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
        following: Following,
    ) -> Following:
        def call(on: Batch | None = None) -> Loss:
            self.called.add(name)
            seen = context if on is None else replace(context, batch=on)

            def inner(other: Batch | None = None) -> Loss:
                return following(seen.batch if other is None else other)

            return plugin.student_gradient(seen, inner)

        return call

    def _student_optimizers(
        self, model: nn.Module, given: tuple[Optimizer, ...], clip: float | None
    ) -> tuple[tuple[Optimizer, ...], float | None]:
        """What plug-ins step instead; optimizers of other modules stay with the method."""
        if not self._hooks[StudentOptimizers]:
            return given, clip
        owned = {id(parameter) for parameter in model.parameters()}
        of_student = tuple(o for o in given if any(id(p) in owned for p in self._params([o])))
        others = tuple(o for o in given if o not in of_student)
        for name, plugin in self._hooks[StudentOptimizers]:
            chosen, clip = plugin.student_optimizers(of_student, clip)
            of_student = tuple(chosen)
            self.called.add(name)
        return (*of_student, *others), clip

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
        self.progress.round_steps += 1

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
        if not seen:
            raise ContractError(
                "an update's optimizers hold no parameter that takes a gradient; unfreeze some"
            )
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
                "steps_per_round": self.progress.steps_per_round,
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
        self.progress.steps_per_round = int(state["progress"]["steps_per_round"])
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
        # Fused kernels walk memory as it lies: moments must lie as their weight does, also for
        # channels-last weights, whose layout a checkpoint does not keep.
        for weight, values in entry.optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    values[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
        entry.steps = int(saved["steps"])


def _joined(parts: Sequence[tuple[float, Loss]]) -> Loss:
    """One loss for the slices of an accumulated batch: weighted means, rows in order."""

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack(
            [share * value for (share, _), value in zip(parts, values, strict=True)]
        ).sum()

    losses = [loss for _, loss in parts]
    terms = {name: mean(loss.terms[name] for loss in losses) for name in losses[0].terms}

    def rows(values: Sequence[Inputs | None]) -> Inputs | None:
        present = [value for value in values if value is not None]
        return fold(join_rows, present) if len(present) == len(losses) else None

    def logits(answers: Sequence[Prediction | None]) -> Prediction | None:
        present = [answer.logits for answer in answers if answer is not None]
        return Prediction(torch.cat(present)) if len(present) == len(losses) else None

    return Loss(
        terms,
        mean(loss.total for loss in losses),
        rows([loss.inputs for loss in losses]),
        logits([loss.teacher for loss in losses]),
        logits([loss.student for loss in losses]),
    )


class ScopedContext:
    """The context as a plug-in sees it: its names do not meet the method's or another plug-in's."""

    def __init__(self, ctx: RunContext, scope: str) -> None:
        self._ctx = ctx
        self._scope = scope

    @property
    def rng(self) -> torch.Generator:
        """A stream of the plug-in's own: what it draws changes nothing that the method draws."""
        return self.generator("rng")

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return self._ctx.progress

    @property
    def device(self) -> torch.device:
        """Where the run computes."""
        return self._ctx.device

    def generator(self, name: str) -> torch.Generator:
        """A further stream of the plug-in's own."""
        return self._ctx.generator(f"{self._scope}/{name}")

    def optimizer(
        self,
        name: str,
        params: Iterable[nn.Parameter],
        factory: OptimizerFactory,
        schedule: Schedule | None = None,
        *,
        fresh: bool = False,
    ) -> Optimizer:
        """An optimizer of the plug-in's own."""
        return self._ctx.optimizer(f"{self._scope}/{name}", params, factory, schedule, fresh=fresh)
