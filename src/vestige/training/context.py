"""What a method and a plug-in see of the trainer: loops, optimizers, updates and randomness."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vestige.core import seeding
from vestige.core.protocols import Following, LossFn, OptimizerFactory, Plugin, Progress
from vestige.core.schedules import Schedule
from vestige.core.types import Batch, Loss, Role, Step
from vestige.errors import ContractError
from vestige.training import runtime
from vestige.training.accumulation import accumulated
from vestige.training.compute import full_precision
from vestige.training.hooks import Hooks
from vestige.training.optimizers import Optimizers, parameters_of
from vestige.training.sharding import over_processes


class RunContext:
    """The Context of `core.protocols`.

    Where several processes run the method, an update's batch is cut over them by rows; everything
    else happens in each of them.

    Args:
        seed: of the run; every stream of randomness derives from it.
        device: where `rng` lives.
        plugins: by name, outermost first.
        reduce: called after the plug-ins with the parameters that move; several processes average
            their gradients once more, so that no rounding drives them apart.
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
        self.hooks = Hooks(plugins)
        self.in_round = False
        self.stopping = False
        self.cut_short = False
        self.rounds_done: dict[str, int] = {}
        self.updating: Role | None = None
        self._generators: dict[str, torch.Generator] = {}
        self._saved_generators: dict[str, Tensor] = {}
        self._optimizers = Optimizers()
        self._passes = 0
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
        self._optimizers.set_round_rates(self.progress.fraction)
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
            self._optimizers.set_round_rates(self.progress.fraction)
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
        self._optimizers.add(name, optimizer, schedule)
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
        processes, clip, step. Plug-ins and the returned loss are of the whole batch, also where
        several processes share it.

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
            batch = self.hooks.student_batch(batch)
            optimizers, clip = self.hooks.student_optimizers(model, optimizers, clip)
            if len(batch) == 0:
                return Step(role)
        params = parameters_of(optimizers)

        def plain(on: Batch | None = None) -> Loss:
            for parameter in params:
                parameter.grad = None
            loss = self._backward(
                role, model, loss_fn, batch if on is None else on, params, accumulate
            )
            # Before the plug-ins, which are the same everywhere and see the gradient of the whole.
            runtime.average_gradients(params)
            return loss

        chain: Following = plain
        self._passes = 0
        if role == "student":
            chain = self.hooks.student_gradient(model, loss_fn, batch, params, plain)
        loss = chain().detach()
        if all(parameter.grad is None for parameter in params):
            raise ContractError(
                f"a {role} update reached none of its {len(params)} parameters; the loss does not "
                "depend on what the optimizers own"
            )
        self._step(params, optimizers, clip, changed=chain is not plain)
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
        params = parameters_of(optimizers)
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
        self._step(params, optimizers, None, changed=True)
        return Step(role, None if loss is None else loss.detach())

    def took(self, role: Role, loss: Loss | None = None) -> Step:
        """One step that was taken elsewhere, by clients say; plug-ins do not see it."""
        self._took(role)
        self.progress.steps += 1
        self.progress.round_steps += 1
        return Step(role, None if loss is None else loss.detach())

    def _took(self, role: Role) -> None:
        # A misspelt role would silently escape every plug-in.
        if role not in get_args(Role):
            raise ContractError(f"got role {role!r}, expected one of {', '.join(get_args(Role))}")
        self.hooks.roles.add(role)
        self.updating = role

    def _backward(
        self,
        role: Role,
        model: nn.Module,
        loss_fn: LossFn,
        batch: Batch,
        params: list[nn.Parameter],
        accumulate: int,
    ) -> Loss:
        def run(on: Batch, share: float) -> Loss:
            loss = self._evaluate(role, model, loss_fn, on)
            with full_precision(self.device):
                (loss.total if share == 1.0 else loss.total * share).backward(inputs=params)
            return loss

        def everywhere(on: Batch, share: float) -> Loss:
            self._passes += 1
            seed = seeding.derive(self.seed, f"update {self.progress.steps}/{self._passes}")
            named = {"": self.rng, **self._generators}
            return over_processes(on, partial(run, share=share), seed, named)

        return accumulated(batch, accumulate, everywhere)

    def _evaluate(self, role: Role, model: nn.Module, loss_fn: LossFn, batch: Batch) -> Loss:
        loss = loss_fn(model, batch)
        if batch.weights is not None and not batch.weights_were_used:
            raise ContractError(
                "a plug-in set weights on the batch and the loss did not use them; reduce "
                "per-sample losses by batch.mean(...)"
            )
        return self.hooks.source_terms(loss, batch) if role == "source" else loss

    def _step(
        self,
        params: list[nn.Parameter],
        optimizers: Sequence[Optimizer],
        clip: float | None,
        *,
        changed: bool,
    ) -> None:
        if changed:
            self._reduce(params)
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        for optimizer in optimizers:
            with full_precision(self.device):
                optimizer.step()
            self._optimizers.stepped(optimizer)
        # Gradients are not needed between steps; keeping them would double a net's memory.
        for parameter in params:
            parameter.grad = None
        self.progress.steps += 1
        self.progress.round_steps += 1

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
            "optimizers": self._optimizers.state(),
            "called": sorted(self.hooks.called),
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
        self.hooks.called = set(state["called"])
        self._optimizers.restore(state["optimizers"], complete=complete)


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
