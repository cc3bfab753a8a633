"""Which part of a network goes between server and clients, and which stays with each client."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from vestige.core.federation import Payload, sent
from vestige.federated.local import BatchNormPolicy, opened, own_statistics, returned


class Sharing:
    """The whole network is shared, but for statistics that stay; or only some of its arrays.

    Args:
        policy: what happens to BatchNorm's statistics where the whole network is shared.
        names: arrays of its state that are shared; None shares it whole. The others are each
            client's own, statistics among them.
    """

    def __init__(self, policy: BatchNormPolicy, names: Sequence[str] | None = None) -> None:
        self.policy, self.names = policy, names

    def offered(self, network: nn.Module) -> dict[str, Tensor]:
        """What the server sends of the global network."""
        state = network.state_dict()
        return sent(state if self.names is None else {name: state[name] for name in self.names})

    def opened(self, network: nn.Module, model: Mapping[str, Tensor], state: Payload) -> None:
        """Load into a client's network what the server sent and what it kept, in place.

        A client that kept nothing yet goes on from the weights that `network` has.
        """
        if self.names is None:
            opened(network, model, state, self.policy)
        else:
            network.load_state_dict({**state.get("own", {}), **model}, strict=False)

    def returned(self, network: nn.Module) -> dict[str, Tensor]:
        """What a client sends of its network."""
        return returned(network, self.policy) if self.names is None else self.offered(network)

    def kept(self, network: nn.Module) -> dict[str, dict[str, Tensor]]:
        """The group of a client's state that holds what it does not send."""
        if self.names is None:
            return own_statistics(network, self.policy)
        state = network.state_dict()
        return {"own": sent({name: state[name] for name in state if name not in self.names})}
