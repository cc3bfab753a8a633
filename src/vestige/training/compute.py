"""How a run computes: precision, compilation, memory format, shortcuts of teachers, lack of memory.

What is set here changes how fast the same numbers come about, up to rounding. Everything is set
inside of a block and put back however the block is left; no network of the user is wrapped.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from vestige.core import parallel
from vestige.core.types import count_parameters
from vestige.errors import OutOfMemoryError, RecipeError, VestigeError
from vestige.teachers.folding import hooked
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training import guard

Precision = Literal["fp32", "bf16"]
Switch = Literal[True, False, "auto"]

# Below, nothing is gained, and the figures of the small presets stay as they were measured.
LARGE = 100_000
_MAPPED = (nn.Conv2d, nn.ConvTranspose2d)
# Student and generator come in train and eval mode, with and without gradients, at several batch
# sizes; torch's limit of 8 variants is shared by all networks of one class.
_VARIANTS = 64
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


class Compute:
    """How the passes of one run are computed.

    Args:
        device: where it runs.
        precision: "bf16" runs what the method does under autocast; weights, optimizers, losses and
            what the trainer does itself (evaluation, diagnosis, callbacks) stay in float32.
        compile: whether teacher, student and generator go through torch.compile.
        channels_last: memory format of networks with 2-D convolutions; "auto" decides per network.
        fold_teacher: whether BatchNorm of frozen teachers is folded; "auto" decides per teacher.

    Raises:
        RecipeError: the machine cannot do what is asked for.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        precision: Precision = "fp32",
        compile: bool = False,
        channels_last: Switch = "auto",
        fold_teacher: Switch = "auto",
    ) -> None:
        self.device = device
        self.precision = precision
        self.compile = compile
        self.channels_last = channels_last
        self.fold_teacher = fold_teacher
        self._aside = False
        if precision == "bf16":
            check_bf16(device)
        if compile:
            check_compiler(device)

    @contextmanager
    def prepared(
        self, networks: Mapping[str, nn.Module], teachers: Sequence[object]
    ) -> Iterator[None]:
        """Compute as set, inside the block.

        Args:
            networks: what the run trains, by name; on the device already.
            teachers: white boxes among them, also inside others, get their shortcuts.

        Raises:
            RecipeError: compilation is asked for in several processes.
        """
        boxes = _distinct(
            box
            for teacher in teachers
            if isinstance(teacher, nn.Module)
            for box in teacher.modules()
            if isinstance(box, WhiteBoxTeacher)
        )
        if self.compile and parallel.world() > 1:
            raise RecipeError(
                f"got trainer.compile: true with {parallel.world()} processes, whose batch "
                "statistics compiled code does not share; set trainer.compile: false"
            )
        trained = _distinct(networks.values())
        with ExitStack() as stack:
            for network in _distinct([*trained, *boxes]):
                if self.lays_out(network):
                    stack.enter_context(laid_out(network))
            for box in boxes:
                if isinstance(box, WhiteBoxTeacher):
                    stack.enter_context(self._hurried(box))
            if self.compile:
                stack.enter_context(_compiler_settings())
                for network in trained:
                    if not any(isinstance(part, WhiteBoxTeacher) for part in network.modules()):
                        stack.enter_context(self._compiled(network))
            stack.enter_context(self.passes())
            yield

    def passes(self) -> AbstractContextManager[Any]:
        """The precision of the method's passes.

        Without autocast's cache of converted weights: the block outlives optimizer steps, after
        which a cached weight would be the old one.
        """
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The trainer's own work: in float32 and not compiled, since batches differ in size."""
        before, self._aside = self._aside, True
        try:
            with full_precision(self.device):
                yield
        finally:
            self._aside = before

    @property
    def eager(self) -> bool:
        """Whether compiled networks are to run uncompiled at present."""
        return self._aside

    def lays_out(self, network: nn.Module) -> bool:
        """Whether `network` runs in channels-last memory format."""
        if not any(isinstance(layer, _MAPPED) for layer in network.modules()):
            return False
        if self.channels_last == "auto":
            # On GPUs it has not been measured.
            return self.device.type == "cpu" and count_parameters(network) >= LARGE
        return self.channels_last is True

    def folds(self, teacher: nn.Module) -> bool:
        """Whether BatchNorm of `teacher` is folded where nobody looks inside."""
        if self.fold_teacher == "auto":
            return count_parameters(teacher) >= LARGE
        return self.fold_teacher is True

    @contextmanager
    def _hurried(self, teacher: WhiteBoxTeacher) -> Iterator[None]:
        shortcut = teacher.shortcut
        before = shortcut.fold, shortcut.compile
        shortcut.fold = shortcut.fold or self.folds(teacher)
        if self.compile:
            shortcut.compile = _compiled_forward
        try:
            yield
        finally:
            shortcut.fold, shortcut.compile = before
            shortcut.forget()

    @contextmanager
    def _compiled(self, network: nn.Module) -> Iterator[None]:
        before = network._compiled_call_impl
        # Where `Module.compile` puts its code, too: no wrapper, no other name of a weight.
        network._compiled_call_impl = _Compiled(network, self)
        try:
            yield
        finally:
            network._compiled_call_impl = before


class _Compiled:
    """Calls compiled code of a network, unless a call wants what the code does not do.

    torch's guards look neither at hooks of sub-modules nor is a second derivative supported, which
    plug-ins take through the network at other weights.
    """

    def __init__(self, network: nn.Module, compute: Compute) -> None:
        self._network = network
        self._compute = compute
        self._code = _compiled_forward(network)
        self._own = _tensors(network)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if self._compute.eager or not self._as_usual():
            return self._network._call_impl(*inputs, **named)
        return self._code(*inputs, **named)

    def _as_usual(self) -> bool:
        if torch_modules._has_any_global_hook():
            return False
        if any(hooked(layer) for layer in self._network.modules()):
            return False
        now = _tensors(self._network)
        return len(now) == len(self._own) and all(
            one is other for one, other in zip(now, self._own, strict=True)
        )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Suspend autocast inside the block: for gradients, optimizer steps and judgements."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def laid_out(network: nn.Module) -> Iterator[None]:
    """Hold 4-D weights of `network` channels-last inside the block, then as they were."""
    before = [(w, w.stride()) for w in _tensors(network) if w.dim() == 4]
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        for tensor, stride in before:
            if tensor.stride() != stride:
                values = torch.empty_strided(
                    tensor.shape, stride, dtype=tensor.dtype, device=tensor.device
                )
                tensor.data = values.copy_(tensor.detach())


@contextmanager
def faults(part: Callable[[], str], advice: Callable[[], str]) -> Iterator[None]:
    """Say of a lack of memory where it arose and what to turn, and of a compiler that it failed.

    Args:
        part: what was being done.
        advice: which settings lower its need.

    Raises:
        OutOfMemoryError: instead of what torch or NumPy raise when memory is exhausted.
        RecipeError: instead of what torch.compile raises when it fails.
    """
    try:
        yield
    except VestigeError:
        raise
    except (MemoryError, RuntimeError) as error:
        said = str(error).strip().split("\n", maxsplit=1)[0]
        if out_of_memory(error):
            raise OutOfMemoryError(f"out of memory in {part()} ({said}); {advice()}") from error
        if _by_compiler(error):
            raise RecipeError(
                f"trainer.compile: got {type(error).__name__} in {part()} ({said}), expected code "
                "that torch.compile can handle; set trainer.compile: false"
            ) from error
        raise


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory of a GPU or of the machine is exhausted."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def less_memory(fields: Mapping[str, Any], precision: Precision) -> str:
    """Which settings a run has that lower its need of memory, in words.

    Args:
        fields: settings of the method, by name.
        precision: that of the run.
    """
    knobs = {
        "batch_size": "lower config.batch_size",
        "accumulate": "raise config.accumulate, which cuts a batch into that many slices",
        "generator_width": "lower config.generator_width",
    }
    known = [text for name, text in knobs.items() if name in fields]
    if precision != "bf16":
        known.append("set trainer.precision: bf16")
    return ", or ".join([*known, "take a machine with more memory"])


def check_bf16(device: torch.device) -> None:
    """Refuse bf16 on a device that does not know it.

    Raises:
        RecipeError: it does not.
    """
    known = torch.amp.is_autocast_available(device.type)
    if not known or (device.type == "cuda" and not torch.cuda.is_bf16_supported()):
        raise RecipeError(
            f"got trainer.precision 'bf16' on a {device.type} device that does not support it, "
            "expected 'fp32'; set trainer.precision: fp32"
        )


def check_compiler(device: torch.device) -> None:
    """Refuse torch.compile on a machine that cannot.

    Raises:
        RecipeError: there is no C++ compiler, or for a GPU no Triton.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch.utils._triton import has_triton

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise RecipeError(
            "got trainer.compile: true on a machine without a C++ compiler, which torch.compile "
            "needs; install g++ or name yours in the variable CXX, or set trainer.compile: false"
        ) from error
    if device.type == "cuda" and not has_triton():
        raise RecipeError(
            "got trainer.compile: true on a GPU without Triton, which torch.compile needs there; "
            "install triton, or set trainer.compile: false"
        )


def _compiled_forward(network: nn.Module) -> Callable[..., Any]:
    code: Callable[..., Any] = torch.compile(network.forward, backend=_inductor)
    return code


def _inductor(graph: Any, inputs: Any) -> Any:
    """Torch's own compiler, which reads and writes files of its own where a method may not.

    No code of the method runs in here: it gets a graph and gives back kernels.
    """
    from torch._inductor.compile_fx import compile_fx

    with guard.pausing():
        return compile_fx(graph, inputs, inner_compile=_inductor_inner)


def _inductor_inner(*args: Any, **named: Any) -> Any:
    """The same for a backward, which is compiled only when it is first asked for."""
    from torch._inductor.compile_fx import compile_fx_inner

    with guard.pausing():
        return compile_fx_inner(*args, **named)


@contextmanager
def _compiler_settings() -> Iterator[None]:
    import torch._dynamo.config
    import torch._inductor.config

    with (
        torch._dynamo.config.patch(recompile_limit=_VARIANTS),
        # Dropout draws what it would have drawn uncompiled.
        torch._inductor.config.patch(fallback_random=True),
    ):
        yield


def _by_compiler(error: BaseException) -> bool:
    dynamo = sys.modules.get("torch._dynamo.exc")
    if dynamo is not None and isinstance(error, dynamo.TorchDynamoException):
        return True
    return "torch.compile" in str(error)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [
        tensor
        for layer in network.modules()
        for tensor in (*layer._parameters.values(), *layer._buffers.values())
        if tensor is not None
    ]


def _distinct(networks: Any) -> list[nn.Module]:
    return list({id(network): network for network in networks}.values())
