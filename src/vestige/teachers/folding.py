"""A frozen network's BatchNorm folded into the weights in front of it, for calls that nobody sees.

In eval mode BatchNorm is a fixed scale and shift per channel, so a convolution or a linear layer in
front of it can do both. The network itself is left as it is: what looks inside, hashes or saves it
finds every layer.
"""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from vestige.core import seeding
from vestige.core.types import Prediction

logger = logging.getLogger(__name__)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# What a forward may raise when it is handed a stand-in instead of a tensor.
_UNTRACEABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
_CHECKED_ROWS = 8
_TOLERANCE = 1e-4

Compile = Callable[[nn.Module], Callable[..., Any]]
# A tensor, where its values lie and how often they were written to.
_Seen = tuple[Tensor, int, int]


class Shortcut:
    """Answers like a frozen network, faster, as long as nobody looks inside it.

    A call goes through the network itself where one of its layers carries a hook (probes read their
    statistics there), is in train mode or has weights that ask for a gradient. Otherwise it goes
    through a twin, made in the first such call and again whenever a weight of the network was
    replaced, moved or written to; the old twin is then dropped. Only a write through `.data`, which
    torch does not count, goes unnoticed: do not do that to a frozen network.

    The twin shares the weights that folding leaves alone, so it holds at most a second copy of the
    others. It is no sub-module: `parameters()` and `state_dict()` of the owner do not list it.

    Attributes:
        fold: whether BatchNorm is folded into the weights in front of it.
        compile: makes a callable of the network or its twin, or None.
    """

    def __init__(self) -> None:
        self.fold = False
        self.compile: Compile | None = None
        self._made_for: tuple[Any, ...] = ()
        self._seen: list[_Seen] = []
        self._plain: Callable[..., Any] | None = None

    def call(self, network: nn.Module, inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """What `network(*inputs, **named)` returns, up to rounding."""
        if not self.fold and self.compile is None:
            return network(*inputs, **named)
        found = _undisturbed(network)
        if found is None:
            return network(*inputs, **named)
        made_for = (network, self.fold, self.compile)
        if self._plain is None or made_for != self._made_for or not _same(found, self._seen):
            self._plain = self._made(network, inputs, named)
            self._made_for, self._seen = made_for, found
        return self._plain(*inputs, **named)

    def forget(self) -> None:
        """Let go of the twin and of what was compiled; both are made again when asked for."""
        self._made_for, self._seen, self._plain = (), [], None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shortcut":
        made = Shortcut()
        made.fold, made.compile = self.fold, self.compile
        return made

    def __getstate__(self) -> dict[str, Any]:
        # Neither twin nor compiled code can be pickled; both are made again.
        return {**Shortcut().__dict__, "fold": self.fold}

    def _made(
        self, network: nn.Module, inputs: Sequence[Any], named: Mapping[str, Any]
    ) -> Callable[..., Any]:
        twin = folded(network, inputs, named) if self.fold else None
        chosen = network if twin is None else twin
        return chosen if self.compile is None else self.compile(chosen)


def folded(
    network: nn.Module, inputs: Sequence[Any], named: Mapping[str, Any] | None = None
) -> nn.Module | None:
    """A twin of a network in eval mode, its BatchNorm folded where a weighted layer feeds only it.

    Tracing follows stand-ins, not values, and could take another branch than a real input does.
    So both are asked for the first rows of real inputs, and a twin that answers differently is not
    used.

    Args:
        network: in eval mode; not changed.
        inputs: one batch as the network takes it; of it 8 rows are used.
        named: the same for keywords.

    Returns:
        The twin, or None where the network has no BatchNorm, cannot be traced, holds none that
        follows a layer with weights, or the answers differ by more than 1e-4 of the largest logit;
        the log says which.
    """
    name = type(network).__name__
    if not any(isinstance(layer, _NORMS) for layer in network.modules()):
        return None
    floating = {w.dtype for w in network.state_dict().values() if w.is_floating_point()}
    if not floating <= {torch.float32, torch.float64}:
        logger.info("BatchNorm of %s is not folded: its weights are of low precision", name)
        return None
    # User code runs in here: what it draws must not be missing later.
    with seeding.preserved(), torch.no_grad():
        try:
            graph = fx.Tracer().trace(network)
            twin = fx.GraphModule(network, graph)
        except _UNTRACEABLE as error:
            logger.info("BatchNorm of %s is not folded: it cannot be traced (%s)", name, error)
            return None
        count = _fold(twin)
        if not count:
            logger.info("BatchNorm of %s is not folded: none follows a layer with weights", name)
            return None
        try:
            difference = _difference(network, twin, inputs, named or {})
        except _UNTRACEABLE as error:
            logger.info("BatchNorm of %s is not folded: its twin fails (%s)", name, error)
            return None
    if not difference <= _TOLERANCE:
        logger.info("BatchNorm of %s is not folded: answers differ by %.1e", name, difference)
        return None
    logger.debug("%d BatchNorm layers of %s are folded into the layers before them", count, name)
    return twin


def _fold(twin: fx.GraphModule) -> int:
    """Fold in place; returns the number of BatchNorm layers that are gone."""
    layers = dict(twin.named_modules(remove_duplicate=False))
    calls = [node for node in twin.graph.nodes if node.op == "call_module"]
    uses = Counter(id(layers[str(node.target)]) for node in calls)
    read = [str(node.target) for node in twin.graph.nodes if node.op == "get_attr"]
    count = 0
    for node in calls:
        before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        place = str(before.target)
        weighted, norm = layers[place], layers[str(node.target)]
        # A layer that is called twice, or whose weight is read elsewhere, must stay as it is.
        if uses[id(weighted)] > 1 or uses[id(norm)] > 1:
            continue
        if any(target.startswith(f"{place}.") for target in read):
            continue
        made = _joined(weighted, norm)
        if made is None:
            continue
        parent, _, attribute = place.rpartition(".")
        setattr(twin.get_submodule(parent), attribute, made)
        node.replace_all_uses_with(before)
        twin.graph.erase_node(node)
        count += 1
    twin.delete_all_unused_submodules()
    twin.recompile()
    return count


def _joined(weighted: nn.Module, norm: nn.Module) -> nn.Module | None:
    """One layer for both, or None; subclasses may compute something else and are left alone."""
    if not isinstance(norm, _NORMS) or type(norm) not in _NORMS or norm.running_mean is None:
        return None
    made: nn.Module
    # In float64: the twin is made once and rounded once.
    if isinstance(weighted, _CONVOLUTIONS) and type(weighted) in _CONVOLUTIONS:
        made = fuse_conv_bn_eval(_exact(weighted), _exact(norm))
    elif type(weighted) is nn.Linear and norm.affine and weighted.out_features == norm.num_features:
        made = fuse_linear_bn_eval(_exact(weighted), _exact(norm))
    else:
        return None
    return made.to(norm.running_mean.dtype).requires_grad_(False)


def _exact(layer: Any) -> Any:
    return copy.deepcopy(layer).double()


def _difference(
    network: nn.Module, twin: nn.Module, inputs: Sequence[Any], named: Mapping[str, Any]
) -> float:
    """Largest difference of the logits, relative to the largest logit."""

    def some(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()[:_CHECKED_ROWS]
        low = value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if low else value

    args, kwargs = [some(value) for value in inputs], {k: some(v) for k, v in named.items()}
    device = next(network.parameters()).device.type
    with torch.autocast(device, enabled=False):
        one, other = (Prediction.of(model(*args, **kwargs)).logits for model in (network, twin))
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-12))


def _undisturbed(network: nn.Module) -> list[_Seen] | None:
    """Every tensor with its place and version; None where a call must see the network itself."""
    if torch_modules._has_any_global_hook():
        return None
    found: list[_Seen] = []
    for layer in network.modules():
        if layer.training or hooked(layer):
            return None
        for tensor in (*layer._parameters.values(), *layer._buffers.values()):
            if tensor is None:
                continue
            if tensor.requires_grad:
                return None
            version = 0 if tensor.is_inference() else tensor._version
            found.append((tensor, tensor.data_ptr(), version))
    return found


def hooked(layer: nn.Module) -> bool:
    """Whether anything was registered to run when this layer is called."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def _same(first: list[_Seen], second: list[_Seen]) -> bool:
    return len(first) == len(second) and all(
        one[0] is other[0] and one[1:] == other[1:]
        for one, other in zip(first, second, strict=True)
    )
