"""What plug-ins do to updates, and whether those that were asked for are called at all."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from vestige.core.protocols import (
    Following,
    LossFn,
    Method,
    Plugin,
    SourceTerms,
    StudentBatch,
    StudentGradient,
    StudentOptimizers,
    StudentUpdate,
)
from vestige.core.types import Batch, Loss, Requires, Role
from vestige.errors import ContractError
from vestige.training.optimizers import parameters_of

_WRAPPED: Mapping[type[Any], Role] = {
    SourceTerms: "source",
    StudentBatch: "student",
    StudentGradient: "student",
    StudentOptimizers: "student",
}


class Hooks:
    """The hooks of a run's plug-ins, in the order of the command line, outermost first.

    Args:
        plugins: by name.

    Attributes:
        called: names of plug-ins that wrapped an update.
        roles: of the updates that took place.
    """

    def __init__(self, plugins: Mapping[str, Plugin]) -> None:
        self.called: set[str] = set()
        self.roles: set[Role] = set()
        self._names = set(plugins)
        self._hooks: dict[type[Any], list[tuple[str, Any]]] = {
            hook: [(name, plugin) for name, plugin in plugins.items() if isinstance(plugin, hook)]
            for hook in _WRAPPED
        }

    def source_terms(self, loss: Loss, batch: Batch) -> Loss:
        """The source's loss with the terms that plug-ins add."""
        for name, plugin in self._hooks[SourceTerms]:
            loss = loss.plus(plugin.source_terms(loss, batch))
            self.called.add(name)
        return loss

    def student_batch(self, batch: Batch) -> Batch:
        """The student's batch with weights set or rows dropped."""
        for name, plugin in self._hooks[StudentBatch]:
            batch = plugin.student_batch(batch)
            self.called.add(name)
        return batch

    def student_gradient(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batch: Batch,
        params: Sequence[nn.Parameter],
        plain: Following,
    ) -> Following:
        """`plain`, which leaves the gradient in `.grad`, wrapped by plug-ins; itself without any.

        Args:
            model: the student.
            loss_fn: of the update.
            batch: of the update.
            params: those that move, of the student and of others.
            plain: forward and backward without plug-ins.
        """
        if not self._hooks[StudentGradient]:
            return plain
        names = {id(p): n for n, p in model.named_parameters()}
        named = {names[id(p)]: p for p in params if id(p) in names}
        update, chain = StudentUpdate(model, loss_fn, batch, named), plain
        for name, plugin in reversed(self._hooks[StudentGradient]):
            chain = self._wrapped(name, plugin, update, chain)
        return chain

    def _wrapped(
        self, name: str, plugin: StudentGradient, update: StudentUpdate, following: Following
    ) -> Following:
        def call(on: Batch | None = None) -> Loss:
            self.called.add(name)
            seen = update if on is None else replace(update, batch=on)

            def inner(other: Batch | None = None) -> Loss:
                return following(seen.batch if other is None else other)

            return plugin.student_gradient(seen, inner)

        return call

    def student_optimizers(
        self, model: nn.Module, given: Sequence[Optimizer], clip: float | None
    ) -> tuple[tuple[Optimizer, ...], float | None]:
        """What plug-ins step instead; optimizers of other modules stay with the method."""
        if not self._hooks[StudentOptimizers]:
            return tuple(given), clip
        owned = {id(parameter) for parameter in model.parameters()}
        of_student = tuple(o for o in given if any(id(p) in owned for p in parameters_of([o])))
        others = tuple(o for o in given if o not in of_student)
        for name, plugin in self._hooks[StudentOptimizers]:
            chosen, clip = plugin.student_optimizers(of_student, clip)
            of_student = tuple(chosen)
            self.called.add(name)
        return (*of_student, *others), clip

    # Whether they are called

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

    def check_roles(self, method: Method) -> None:
        """Refuse at once a plug-in that wraps what the method says it never does."""
        requires: Requires | None = getattr(method, "requires", None)
        if requires is None or not requires.roles:
            return
        useless = sorted(self._names - self.wrapping(requires.roles))
        if useless:
            raise ContractError(
                f"plug-ins {useless} were not called and never will be: "
                f"{type(method).__name__} makes updates of role {', '.join(requires.roles)} "
                "only, and they wrap others; leave them out"
            )

    def check_round(self, method: Method) -> None:
        """Refuse after a round a plug-in that its updates passed by."""
        uncalled = self.uncalled()
        if uncalled:
            raise ContractError(
                f"plug-ins {uncalled} were not called in a round with updates that they wrap; "
                f"{type(method).__name__} does not route these through ctx.update"
            )

    def check_run(self, method: Method) -> None:
        """Refuse at the end a plug-in that was never called."""
        uncalled = sorted(self._names - self.called)
        if uncalled:
            raise ContractError(
                f"plug-ins {uncalled} were never called; {type(method).__name__} makes no "
                "update that they could wrap"
            )
