"""A network as blocks in a row, cut into the blocks before a place and those behind it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vestige.core.modes import evaluating
from vestige.core.types import InputSpec, predict
from vestige.errors import RecipeError

# Names of the child modules of one block, in the order in which they run.
Names = tuple[str, ...]


class Segment(nn.Module):
    """Some modules of a network, one after another, under the names they have there.

    Its `state_dict` is the part of the network's that belongs to them; the weights are shared.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        """Takes the modules over.

        Args:
            parts: by their names in the network, dots included, in the order in which they run.
        """
        super().__init__()
        self.order = tuple(parts)
        for name, part in parts.items():
            *path, last = name.split(".")
            holder: nn.Module = self
            for step in path:
                if step not in holder._modules:
                    holder.add_module(step, nn.Module())
                holder = holder.get_submodule(step)
            holder.add_module(last, part)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the last module puts out, (B, ...)."""
        for name in self.order:
            inputs = self.get_submodule(name)(inputs)
        return inputs


class Blocks:
    """A network of L blocks that run one after another, the last of which ends in the logits.

    Args:
        network: its weights are shared with every segment.
        names: of each block the child modules in the order in which they run, as in
            `network.named_modules()`. None takes the children of an `nn.Sequential`: each that has
            weights begins a block, and those without join the one before.

    Raises:
        RecipeError: the network has no such modules, some of its weights are in no block or in two,
            or there are fewer than two blocks.
    """

    def __init__(self, network: nn.Module, names: Sequence[Sequence[str]] | None = None) -> None:
        self.network = network
        self.names = _children(network) if names is None else tuple(map(tuple, names))
        known = dict(network.named_modules(remove_duplicate=False))
        listed = [name for block in self.names for name in block]
        if unknown := [name for name in listed if not name or name not in known]:
            raise RecipeError(
                f"got blocks of modules {unknown}, expected names of modules of "
                f"{type(network).__name__}, for example {[name for name in known if name][:8]}; "
                "correct the blocks"
            )
        if len(self.names) < 2 or not all(self.names):
            raise RecipeError(
                f"got {len(self.names)} blocks {list(self.names)}, expected at least two with one "
                "module or more in each; name them by 'blocks'"
            )
        held = [id(weight) for name in listed for weight in known[name].parameters()]
        own = {id(weight): name for name, weight in network.named_parameters()}
        if missing := [name for key, name in own.items() if key not in held]:
            raise RecipeError(
                f"got blocks that leave out {missing[:4]}, expected every weight of "
                f"{type(network).__name__} in a block; add the modules that hold them"
            )
        if len(held) > len(own):
            raise RecipeError(
                "got blocks that share a weight, expected every weight in one block; leave out "
                "modules that lie within others, and untie weights"
            )

    def __len__(self) -> int:
        return len(self.names)

    def split_at(self, cut: int) -> tuple[Segment, Segment]:
        """Blocks 1..cut and blocks cut+1..L, which share the network's weights.

        Args:
            cut: from 1 to L - 1.

        Raises:
            RecipeError: another cut.
        """
        if not 1 <= cut < len(self):
            raise RecipeError(
                f"got cut {cut} of {len(self)} blocks, expected 1 to {len(self) - 1}; correct it"
            )
        return self._segment(self.names[:cut]), self._segment(self.names[cut:])

    @torch.no_grad()
    def shapes(self, spec: InputSpec) -> list[tuple[int, ...]]:
        """Shape of what each block puts out for one input, without the batch dimension.

        Raises:
            RecipeError: the blocks one after another do not compute what the network computes.
        """
        weight = next(self.network.parameters())
        inputs = torch.randn(2, *spec.shape, generator=torch.Generator().manual_seed(0))
        inputs = inputs.to(weight.device)
        found: list[tuple[int, ...]] = []
        with evaluating(self.network):
            wanted = predict(self.network, inputs).logits
            for number, block in enumerate(self.names, 1):
                try:
                    inputs = self._segment((block,))(inputs)
                except (RuntimeError, TypeError, ValueError) as error:
                    raise self._no_row(f"block {number} {list(block)} fails: {error}") from error
                found.append(tuple(inputs.shape[1:]))
        if inputs.shape != wanted.shape or not torch.allclose(inputs.float(), wanted):
            raise self._no_row("their output is another one")
        return found

    def _no_row(self, reason: str) -> RecipeError:
        return RecipeError(
            f"got {len(self)} blocks {list(map(list, self.names))}, expected that they compute, "
            f"one after another, what {type(self.network).__name__} does, but {reason}; name other "
            "modules by 'blocks', or take a network whose forward does nothing between its "
            "modules, for example 'block-cnn'"
        )

    def _segment(self, blocks: Sequence[Names]) -> Segment:
        names = [name for block in blocks for name in block]
        return Segment({name: self.network.get_submodule(name) for name in names})


def _children(network: nn.Module) -> tuple[Names, ...]:
    """A block for each child of a sequential network that has weights."""
    if not isinstance(network, nn.Sequential):
        raise RecipeError(
            f"got a {type(network).__name__}, expected an nn.Sequential or the names of the "
            "modules that run one after another; name them by 'blocks'"
        )
    found: list[list[str]] = []
    for name, child in network.named_children():
        started = found and any(
            next(network.get_submodule(one).parameters(), None) is not None for one in found[-1]
        )
        if not found or (started and next(child.parameters(), None) is not None):
            found.append([name])
        else:
            found[-1].append(name)
    return tuple(map(tuple, found))
