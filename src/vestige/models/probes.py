"""Reading a network's inside while it runs, with hooks that live only inside a `with`."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from vestige.core import modes, parallel
from vestige.core.types import at_least_float32
from vestige.errors import ContractError, NoBatchNormError, RecipeError, TeacherError
from vestige.losses.statistics import Stats


def batchnorm_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """BatchNorm layers of `module` that store running statistics.

    Returns:
        Layers by qualified name, in the order of definition; a layer that is registered twice
        appears once.
    """
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm)
        and layer.running_mean is not None
        and layer.running_var is not None
    }


class _Probe(ABC):
    """Hooks on some layers of a network that live inside a `with`, and what they last saw.

    Attributes:
        names: qualified names of the layers, in the order of what is read.
    """

    def __init__(self, module: nn.Module, layers: dict[str, nn.Module]) -> None:
        self.names: tuple[str, ...] = tuple(layers)
        self._module = module
        self._watched = layers
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if self._handles:
            raise ContractError(
                f"got a {type(self).__name__} that is entered already, expected one `with` at a "
                "time; make a second probe for a nested one"
            )
        self._seen = {}
        # Without this a layer that the next forward skips would keep what the last batch left.
        self._handles.append(self._module.register_forward_pre_hook(self._forget))
        for name, layer in self._watched.items():
            self._handles.append(self._hook(name, layer))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    @abstractmethod
    def _hook(self, name: str, layer: nn.Module) -> RemovableHandle:
        """What notes the layer of this name."""

    def _forget(self, module: nn.Module, args: Any) -> None:
        self._seen = {}

    def _read(self, what: str) -> list[Any]:
        missing = [name for name in self.names if name not in self._seen]
        if missing:
            raise ContractError(
                f"got no {what} of {len(missing)} of {len(self.names)} layers (first "
                f"{missing[0]!r}), expected one forward through all of them; call the network "
                "inside the `with` before reading"
            )
        return [self._seen[name] for name in self.names]


class BatchNormProbe(_Probe):
    """Observes what enters each BatchNorm layer of a network.

    Use it as `with BatchNormProbe(teacher) as probe: teacher(inputs); probe.observed()`. Hooks
    exist only inside the `with` and are removed however it is left; what was observed stays
    readable until the probe is entered again. Several probes may watch one network.

    Attributes:
        names: qualified names of the layers, in the order of `observed` and `stored`.
    """

    def __init__(
        self, module: nn.Module, *, statistics: bool = True, instance_means: bool = False
    ) -> None:
        """Finds the layers; hooks nothing yet.

        Args:
            module: the network.
            statistics: observe mean and variance over the batch, for `observed`.
            instance_means: observe each row's means over positions, for `instance_means`; at no
                cost beside `statistics`.

        Raises:
            ContractError: neither of the two is asked for.
            NoBatchNormError: no BatchNorm layer of `module` stores running statistics.
        """
        self._layers = batchnorm_layers(module)
        if not self._layers:
            total = sum(isinstance(layer, _BatchNorm) for layer in module.modules())
            raise NoBatchNormError(
                f"got a {type(module).__name__} with {total} BatchNorm layers, 0 of them with "
                "running statistics; expected at least 1; use a method that needs none "
                "(vestige list methods --without batchnorm) or set bn_weight: 0"
            )
        if not statistics and not instance_means:
            raise ContractError(
                "got a BatchNormProbe that observes nothing, expected statistics, instance_means "
                "or both"
            )
        super().__init__(module, dict(self._layers))
        self._statistics, self._instance_means = statistics, instance_means

    def observed(self) -> tuple[Stats, ...]:
        """Statistics of each layer's input in the last forward.

        Returns:
            Per layer mean (C,) and biased variance (C,) over batch and positions, at least float32,
            with gradient to the inputs unless the forward ran without.

        Raises:
            ContractError: no forward ran inside the `with`, the last one skipped a layer, or the
                probe was made without `statistics`.
        """
        self._ask("statistics", self._statistics)
        return tuple(stats for stats, _ in self._read("statistics"))

    def instance_means(self) -> Tensor:
        """Means over positions of each layer's input in the last forward.

        Returns:
            (B, D), the layers side by side in the order of `names`, so D is the sum of their
            channels; at least float32, with gradient to the inputs unless the forward ran without.

        Raises:
            ContractError: no forward ran inside the `with`, the last one skipped a layer, or the
                probe was made without `instance_means`.
        """
        self._ask("instance_means", self._instance_means)
        return torch.cat([means for _, means in self._read("instance means")], dim=1)

    def stored(self) -> tuple[Stats, ...]:
        """Running mean (C,) and variance (C,) of each layer, no gradient; views, not copies."""
        return tuple(
            Stats(layer.running_mean.detach(), layer.running_var.detach())
            for layer in self._layers.values()
            if layer.running_mean is not None and layer.running_var is not None
        )

    def _ask(self, what: str, is_there: bool) -> None:
        if not is_there:
            raise ContractError(
                f"got a BatchNormProbe made with {what}=False, expected True to read them; "
                f"make it as BatchNormProbe(module, {what}=True)"
            )

    def _hook(self, name: str, layer: nn.Module) -> RemovableHandle:
        def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            values = args[0]
            # bfloat16 has 8 bits of mantissa: too few for a variance that is compared.
            if values.dtype in (torch.float16, torch.bfloat16):
                values = values.float()
            if self._statistics:
                mean, var, means = parallel.batch_moments(values)
                self._seen[name] = Stats(mean, var), means
            else:
                self._seen[name] = None, position_means(values)

        return layer.register_forward_pre_hook(record)


class FeatureProbe(_Probe):
    """Keeps what enters or leaves named layers of a network.

    Use it as `with FeatureProbe(teacher, ["stages.3"]) as probe: teacher(inputs);
    probe.features()`. Hooks exist only inside the `with`; what was seen stays readable until the
    probe is entered again.

    Attributes:
        names: qualified names of the layers, in the order of `features`.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str], *, of: str = "output") -> None:
        """Finds the layers; hooks nothing yet.

        Args:
            module: the network.
            layers: qualified names, as in `named_modules`, at least one; a layer that a forward
                runs several times is seen as it was the last time.
            of: "output", or "input", the first positional argument.

        Raises:
            RecipeError: `of` is neither of the two.
            TeacherError: `module` has no layer of that name, or no layer is named.
        """
        if of not in ("input", "output"):
            raise RecipeError(f"got of={of!r}, expected 'input' or 'output'")
        known = dict(module.named_modules())
        unknown = [name for name in layers if name not in known]
        if unknown or not layers:
            near = difflib.get_close_matches(unknown[0], known, n=3) if unknown else []
            raise TeacherError(
                f"got layers {list(layers)} of a {type(module).__name__}, expected names of its "
                f"sub-modules; {f'near are {near}' if near else 'see named_modules()'}"
            )
        super().__init__(module, {name: known[name] for name in layers})
        self._of = of

    def features(self) -> tuple[Tensor, ...]:
        """What was seen of each layer in the last forward, with gradient unless it ran without.

        Raises:
            ContractError: no forward ran inside the `with`, or the last one skipped a layer.
        """
        return tuple(self._read("features"))

    def instance_means(self) -> Tensor:
        """The features (B, C, ...) averaged over positions, side by side: (B, sum of C).

        Raises:
            ContractError: as for `features`.
        """
        return torch.cat([position_means(seen) for seen in self.features()], dim=1)

    def _hook(self, name: str, layer: nn.Module) -> RemovableHandle:
        if self._of == "input":

            def enters(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
                self._seen[name] = args[0]

            return layer.register_forward_pre_hook(enters)

        def leaves(layer: nn.Module, args: Any, output: Tensor) -> None:
            self._seen[name] = output

        return layer.register_forward_hook(leaves)


class LinearSeen(NamedTuple):
    """A linear layer in one forward.

    Attributes:
        inputs: what entered it, (B, d), at least float32, with gradient unless the forward ran
            without.
        weight: (K, d), with which it ran.
        bias: (K,), or None.
    """

    inputs: Tensor
    weight: Tensor
    bias: Tensor | None


class LinearProbe(_Probe):
    """Keeps what enters a linear layer and the weights that it has at that moment.

    In a network that runs at other weights (`core.functional`) these are not the live ones, so a
    loss on weights that is to hold there reads them here. Use it like a `FeatureProbe`.

    Attributes:
        names: the qualified name of the layer.
    """

    def __init__(self, module: nn.Module, layer: str) -> None:
        """Finds the layer; hooks nothing yet.

        Args:
            module: the network.
            layer: qualified name of a linear layer.

        Raises:
            TeacherError: there is no linear layer of that name.
        """
        found = dict(module.named_modules()).get(layer)
        if not isinstance(found, nn.Linear):
            raise TeacherError(
                f"got layer {layer!r} of a {type(module).__name__}, which is "
                f"{'not there' if found is None else f'a {type(found).__name__}'}, expected a "
                "linear layer; name another"
            )
        super().__init__(module, {layer: found})

    def read(self) -> LinearSeen:
        """What was seen in the last forward.

        Raises:
            ContractError: no forward ran inside the `with`, or the last one skipped the layer.
        """
        (seen,) = self._read("input")
        return LinearSeen(*seen)

    def _hook(self, name: str, layer: nn.Module) -> RemovableHandle:
        def enters(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._seen[name] = at_least_float32(args[0]), layer.weight, layer.bias

        return layer.register_forward_pre_hook(enters)


def instance_features(
    module: nn.Module, shape: Sequence[int], layers: Sequence[str] = ()
) -> tuple[BatchNormProbe | FeatureProbe, int]:
    """A probe whose `instance_means` describe single inputs, and their width.

    Args:
        module: the network.
        shape: of one input, (C, H, W).
        layers: whose inputs count. Empty takes the BatchNorm layers, where there are none the
            outputs of the last layer of each resolution, and in a network without maps what enters
            its last layer; but for BatchNorm layers one forward of a zero image tells the width.
    """
    known = batchnorm_layers(module)
    if known and not layers:
        probe = BatchNormProbe(module, statistics=False, instance_means=True)
        return probe, sum(layer.num_features for layer in known.values())
    if layers:
        named = FeatureProbe(module, layers, of="input")
    elif maps := tuple(_last_of_resolutions(module, shape).values()):
        named = FeatureProbe(module, maps)
    else:
        named = FeatureProbe(module, [penultimate_layer(module)], of="input")
    with torch.no_grad(), modes.evaluating(module), named:
        module(next(module.parameters()).new_zeros(1, *shape))
    return named, named.instance_means().shape[1]


def position_means(values: Tensor) -> Tensor:
    """Values (B, C, ...) averaged over positions: (B, C); (B, C) stays as it is."""
    if values.dim() == 2:
        return values
    maps = values.flatten(2)
    # Unlike that of a mean, the gradient of a sum is never written out.
    return maps.sum(2) / maps.shape[2]


def penultimate_layer(module: nn.Module) -> str:
    """Name of the layer that makes logits of features: what enters it is penultimate.

    Returns:
        The qualified name of the last linear layer by definition, or of the last 1x1 convolution
        where there is none.

    Raises:
        TeacherError: the network has neither.
    """
    layers = list(module.named_modules())
    linear: list[str] = [name for name, layer in layers if isinstance(layer, nn.Linear)]
    pointwise: list[str] = [
        name
        for name, layer in layers
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
    ]
    if found := linear or pointwise:
        return found[-1]
    raise TeacherError(
        f"got a {type(module).__name__} without a linear layer or 1x1 convolution, expected one "
        "that makes its logits; name the layer yourself"
    )


def spatial_layers(
    module: nn.Module, shape: Sequence[int], *, count: int | None = None
) -> tuple[str, ...]:
    """The last layer of each resolution that a network passes through, for attention transfer.

    Found by one forward of a zero image without gradient, the network in eval mode meanwhile.

    Args:
        module: the network.
        shape: of one input, (C, H, W).
        count: how many, counted from the logits; None takes all.

    Returns:
        Qualified names in the order of the forward. A map of one position has no attention and is
        left out.

    Raises:
        TeacherError: there are fewer than `count` resolutions, or none.
    """
    names = tuple(_last_of_resolutions(module, shape).values())
    if not names or len(names) < (count or 1):
        raise TeacherError(
            f"got a {type(module).__name__} with maps of {len(names)} resolutions of more than one "
            f"position, expected at least {count or 1}; name layers "
            "in the method's settings, or do without attention"
        )
    return names if count is None else names[-count:]


def paired_layers(
    first: nn.Module, second: nn.Module, shape: Sequence[int]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Layers of two networks whose maps have the same resolution, for attention transfer.

    Args:
        first: a network.
        second: another one for the same inputs.
        shape: of one input, (C, H, W).

    Returns:
        Names in `first` and in `second`, the last layer of each resolution that both have.

    Raises:
        TeacherError: they share none.
    """
    found = _last_of_resolutions(first, shape), _last_of_resolutions(second, shape)
    shared = [size for size in found[0] if size in found[1]]
    if not shared:
        raise TeacherError(
            f"got networks with maps of {[*found[0]]} and {[*found[1]]}, expected one size that "
            "both have; name pairs of layers, or go without maps (attention_weight: 0)"
        )
    return tuple(found[0][size] for size in shared), tuple(found[1][size] for size in shared)


def _last_of_resolutions(module: nn.Module, shape: Sequence[int]) -> dict[tuple[int, ...], str]:
    """Height and width to the last layer that makes such maps, in the order of the forward."""
    last: dict[tuple[int, ...], str] = {}
    handles = []

    def recorder(name: str) -> Callable[..., None]:
        def record(layer: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and output[0, 0].numel() > 1:
                last.pop(tuple(output.shape[2:]), None)
                last[tuple(output.shape[2:])] = name

        return record

    like = next(module.parameters())
    try:
        for name, layer in module.named_modules():
            if name:
                handles.append(layer.register_forward_hook(recorder(name)))
        with torch.no_grad(), modes.evaluating(module):
            module(like.new_zeros(1, *shape))
    finally:
        for handle in handles:
            handle.remove()
    return last
