"""Time the passes of a run's networks, on the inputs and in the precision of a real step.

A method says in `passes` how often a round needs each pass. A name there is `<network>_<pass>`: the
network is "student", "teacher" or a key of the method's parts, the pass one of `PASSES`. "observed"
is a forward in which the statistics of what enters the BatchNorm layers are taken, and the backward
of both to the inputs; it counts neither as forward nor as backward. What a network is fed with is
recorded by hooks while real steps run, so that any method can be timed.
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from vestige.core import modes
from vestige.core.protocols import Teacher
from vestige.core.types import Prediction
from vestige.errors import ContractError
from vestige.models.probes import BatchNormProbe
from vestige.training.parts import networks_of

PASSES = ("forward", "backward", "backward_to_input", "observed", "step")
# Longest first: "backward_to_input" also ends in "input", and a network may be called "x_backward".
_BY_LENGTH = sorted(PASSES, key=len, reverse=True)
_MOST_PER_CYCLE = 16


def split_pass(name: str) -> tuple[str, str]:
    """Network and pass of a name in `passes`.

    Raises:
        ContractError: the name ends in none of `PASSES`.
    """
    for kind in _BY_LENGTH:
        network, found, rest = name.rpartition(f"_{kind}")
        if found and network and not rest:
            return network, kind
    raise ContractError(
        f"got the pass {name!r}, expected <network>_<pass> with one of {', '.join(PASSES)}; "
        "correct the method's passes()"
    )


def timed_networks(
    parts: Mapping[str, object], teachers: Sequence[Teacher], student: nn.Module | None
) -> dict[str, nn.Module]:
    """The networks of a run by the names that `passes` uses.

    Args:
        parts: the method's; modules count, and the networks that other parts hold as "part/key".
        teachers: "teacher" is the first, where it is a module.
        student: "student", where there is one.
    """
    found: dict[str, nn.Module] = {}
    if student is not None:
        found["student"] = student
    if teachers and isinstance(teachers[0], nn.Module):
        found["teacher"] = teachers[0]
    return found | networks_of(parts)


@dataclass
class Call:
    """How a network was called: inputs without graph, training flags, precision, and how often."""

    args: tuple[Any, ...]
    named: dict[str, Any]
    flags: dict[str, bool]
    precision: torch.dtype | None
    count: int = 0

    @property
    def rows(self) -> int:
        """Length of the first tensor among the inputs; 0 without one."""
        return next((len(x) for x in _tensors(self.args, self.named) if x.dim()), 0)

    @property
    def shapes(self) -> list[list[int]]:
        """Of all tensors among the inputs."""
        return [list(x.shape) for x in _tensors(self.args, self.named)]


class PassRecorder:
    """Notes, while real steps run in its block, how networks are called and what moves them.

    One call is kept for each combination of input shapes and mode; optimizers are kept as they are
    after their step, so that they have their state. Calls that no step follows, such as those of an
    evaluation, do not count.

    Attributes:
        calls: by network.
        optimizers: by network, those that own at least one of its weights.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.networks = dict(networks)
        self.calls: dict[str, list[Call]] = {name: [] for name in networks}
        self.optimizers: dict[str, list[Optimizer]] = {name: [] for name in networks}
        self._owners = {id(p): name for name, net in networks.items() for p in net.parameters()}
        self._handles: list[Any] = []
        self._pending: list[tuple[str, Call]] = []
        self._known: dict[tuple[object, ...], Call] = {}

    def __enter__(self) -> Self:
        for name, network in self.networks.items():
            self._handles.append(
                network.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            )
        self._handles.append(register_optimizer_step_post_hook(self._stepped))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def complete(self, names: Mapping[str, float]) -> bool:
        """Whether everything was seen that the passes `names` need, of the networks it knows."""
        return all(split_pass(name)[0] not in self.networks for name in self.missing(names))

    def missing(self, names: Mapping[str, float]) -> list[str]:
        """The passes that take place but for which nothing was seen."""
        found = []
        for name, count in names.items():
            network, kind = split_pass(name)
            seen = self.optimizers if kind == "step" else self.calls
            if count > 0 and not seen.get(network):
                found.append(name)
        return found

    def forget(self) -> None:
        """Start anew: what was seen belongs to another loop than the one that is timed."""
        self._known.clear()
        self._pending.clear()
        self.calls = {name: [] for name in self.networks}
        self.optimizers = {name: [] for name in self.networks}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            tensors = _tensors(args, named)
            where = tensors[0].device.type if tensors else "cpu"
            precision = (
                torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else None
            )
            key = (name, module.training, precision, *(x.shape for x in tensors))
            if key not in self._known:
                self._known[key] = Call(
                    tuple(_detached(x) for x in args),
                    {argument: _detached(x) for argument, x in named.items()},
                    modes.flags(module),
                    precision,
                )
            self._pending.append((name, self._known[key]))

        return hook

    def _stepped(self, optimizer: Optimizer, *rest: Any) -> None:
        for name, call in self._pending:
            if call.count == 0:
                self.calls[name].append(call)
            call.count += 1
        self._pending.clear()
        owners = {
            self._owners[id(p)]
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in self._owners
        }
        for name in owners:
            # Of those that live for one round only the latest is wanted.
            kind = type(optimizer)
            kept = [o for o in self.optimizers[name] if o is not optimizer and type(o) is not kind]
            self.optimizers[name] = [*kept, optimizer]


@dataclass
class Measured:
    """What passes took.

    Attributes:
        seconds: of one pass, by its name in `passes`; the mean over all that were timed.
        unknown: names in `passes` that could not be timed, because no such network was called.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def total(self, passes: Mapping[str, float]) -> float:
        """Seconds of all passes together."""
        return sum(count * self.seconds.get(name, 0.0) for name, count in passes.items())


class PassTimer:
    """Times each pass, in turn with the others, as a round has them in turn.

    Networks keep their weights and gradients. BatchNorm statistics, the generators of random
    numbers and what networks count move as in real passes: time what may be thrown away.

    Args:
        recorder: has seen real steps.
        passes: counts per round.
        device: where the networks are; times of a GPU are its own, without waiting for Python.
    """

    def __init__(
        self, recorder: PassRecorder, passes: Mapping[str, float], device: torch.device
    ) -> None:
        self._wanted = {name: count for name, count in passes.items() if count > 0}
        self._clock = _Clock(device)
        runs: list[tuple[Callable[[], None], float]] = []
        for name in dict.fromkeys(split_pass(name)[0] for name in self._wanted):
            runs += _runs(name, recorder, self._wanted, self._clock)
        least = min((count for _, count in runs), default=1.0)
        self._turns = [(run, min(_MOST_PER_CYCLE, max(1, round(n / least)))) for run, n in runs]

    def cycle(self) -> None:
        """Go through the passes once, each as often as the proportions of a round ask for."""
        for turn in range(max((times for _, times in self._turns), default=0)):
            for run, times in self._turns:
                if turn < times:
                    run()

    def once(self) -> None:
        """Go through the passes, each once."""
        for run, _ in self._turns:
            run()

    def take(self) -> Measured:
        """What was timed since the last call."""
        taken = self._clock.means()
        return Measured(
            {name: taken[name] for name in self._wanted if name in taken},
            [name for name in self._wanted if name not in taken],
        )


def _runs(
    name: str, recorder: PassRecorder, wanted: Mapping[str, float], clock: "_Clock"
) -> list[tuple[Callable[[], None], float]]:
    """What one network does in a round, each with its count."""
    forward, full, to_input, step = (
        wanted.get(f"{name}_{kind}", 0.0)
        for kind in ("forward", "backward", "backward_to_input", "step")
    )
    found: list[tuple[Callable[[], None], float]] = []
    calls = recorder.calls.get(name, [])
    if calls:
        runner = _Runner(name, recorder.networks[name], _in_proportion(calls), clock)
        # A forward that a backward follows keeps what that needs; the others do not.
        found = [
            (runner.forward, forward - full - to_input),
            (runner.backward, full),
            (runner.backward_to_input, to_input),
            (runner.observed, wanted.get(f"{name}_observed", 0.0)),
        ]
    if step and recorder.optimizers.get(name):
        found.append((_stepping(name, recorder.optimizers[name], clock), step))
    return [(run, count) for run, count in found if count > 0]


class _Runner:
    """The passes of one network, on each of its recorded calls in turn."""

    def __init__(
        self, name: str, network: nn.Module, calls: Iterator[Call], clock: "_Clock"
    ) -> None:
        self.name = name
        self.network = network
        self.weights = [weight for weight in network.parameters() if weight.requires_grad]
        self.calls = calls
        self.clock = clock

    def forward(self) -> None:
        """Without graph."""
        with self._called() as call, torch.no_grad(), self.clock.timing(f"{self.name}_forward"):
            self.network(*call.args, **call.named)

    def backward(self) -> None:
        """Forward with graph, and backward to the weights."""
        with self._called() as call:
            self._there_and_back(call.args, call.named, self.weights, "backward")

    def backward_to_input(self) -> None:
        """Forward with graph, and backward to the inputs alone."""
        with self._called() as call:
            args = tuple(_attached(x) for x in call.args)
            named = {name: _attached(x) for name, x in call.named.items()}
            inputs = [x for x in _tensors(args, named) if x.requires_grad]
            self._there_and_back(args, named, inputs, "backward_to_input")

    def observed(self) -> None:
        """Forward with statistics, and backward of both to the inputs."""
        with self._called() as call:
            args = tuple(_attached(x) for x in call.args)
            named = {name: _attached(x) for name, x in call.named.items()}
            inputs = [x for x in _tensors(args, named) if x.requires_grad]
            probe = BatchNormProbe(self.network)
            with self.clock.timing(f"{self.name}_observed"):
                with probe:
                    logits = Prediction.of(self.network(*args, **named)).logits
                seen = [value for stats in probe.observed() for value in stats]
                slopes = [torch.ones_like(value) for value in (logits, *seen)]
                torch.autograd.grad([logits, *seen], inputs, slopes, allow_unused=True)
                del logits, seen, probe

    @contextmanager
    def _called(self) -> Iterator[Call]:
        call = next(self.calls)
        before = modes.flags(self.network)
        modes.set_flags(self.network, call.flags)
        try:
            with _precision(call, self.clock.device):
                yield call
        finally:
            modes.set_flags(self.network, before)

    def _there_and_back(
        self, args: tuple[Any, ...], named: dict[str, Any], to: Sequence[Tensor], kind: str
    ) -> None:
        with self.clock.timing(f"{self.name}_forward"):
            logits = Prediction.of(self.network(*args, **named)).logits
        slope = torch.ones_like(logits)
        with self.clock.timing(f"{self.name}_{kind}"):
            # The graph goes, too: freeing it is part of every backward.
            torch.autograd.grad(logits, to, slope, allow_unused=True)
            del logits


def _stepping(name: str, optimizers: Sequence[Optimizer], clock: "_Clock") -> Callable[[], None]:
    """Steps of copies, so that the run's own weights and moments stay."""
    copies = [copy.deepcopy(optimizer) for optimizer in optimizers]
    for made in copies:
        for group in made.param_groups:
            group["lr"] = 0.0
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)

    def step() -> None:
        with clock.timing(f"{name}_step"):
            for made in copies:
                made.step()

    return step


class _Clock:
    """Sums times by name; on a GPU from its own events, read at the end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, list[float]] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        if self.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
        else:
            start = time.perf_counter()
            yield
            self._seconds.setdefault(name, []).append(time.perf_counter() - start)

    def means(self) -> dict[str, float]:
        """By name; starts anew."""
        if self._events:
            torch.cuda.synchronize(self.device)
            for name, first, last in self._events:
                self._seconds.setdefault(name, []).append(first.elapsed_time(last) / 1000)
            self._events.clear()
        found = {name: sum(values) / len(values) for name, values in self._seconds.items()}
        self._seconds.clear()
        return found


def _precision(call: Call, device: torch.device) -> AbstractContextManager[object]:
    enabled = call.precision is not None
    return torch.autocast(device.type, call.precision, enabled=enabled)


def _in_proportion(calls: Sequence[Call]) -> Iterator[Call]:
    """The calls in turn, without end, each as often as it was seen."""
    least = min(call.count for call in calls)
    return itertools.cycle(
        [c for c in calls for _ in range(min(_MOST_PER_CYCLE, max(1, round(c.count / least))))]
    )


def _tensors(args: Sequence[Any], named: Mapping[str, Any]) -> list[Tensor]:
    return [x for x in (*args, *named.values()) if isinstance(x, Tensor)]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _attached(value: Any) -> Any:
    """A leaf of its own for inputs that can take a gradient."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_(True)
    return value
