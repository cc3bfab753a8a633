"""A network that stays with its client: weights, running statistics and momentum."""

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from vestige.core.federation import ClientData, Payload, sent
from vestige.federated.local import ClientTraining, cross_entropy, descend, descent, trained


class PersonalTraining(ClientTraining):
    """Settings of clients that keep a network of their own.

    Attributes:
        client_momentum: of SGD; lives on from round to round with the client's network.
        bn_policy: "local" lets the running statistics of BatchNorm follow the client's own data,
            "frozen" keeps those that its network started with.
    """

    bn_policy: Literal["local", "frozen"] = "local"


def opened(network: nn.Module, state: Payload, device: torch.device | str) -> nn.Module:
    """A client's own network on `device`: a copy of `network`, at the client's weights if any.

    Args:
        network: with the weights that every client starts from.
        state: what `train` gave the last time, {} the first time.
        device: where to.
    """
    own = copy.deepcopy(network)
    if "network" in state:
        own.load_state_dict(dict(state["network"]))
    return own.to(device)


def train(
    network: nn.Module,
    data: ClientData,
    cfg: ClientTraining,
    state: Payload,
    *,
    lr: float,
    rng: torch.Generator,
    loss_of: Callable[[Tensor], Tensor] | None = None,
) -> tuple[float, Payload]:
    """Train a client's own network in place, with the momentum that it had.

    Args:
        network: of `opened`; left in train mode.
        data: with at least one example.
        cfg: steps, batch size and everything else.
        state: as for `opened`.
        lr: of this round.
        rng: draws the batches.
        loss_of: see `local.descend`; None is the cross-entropy.

    Returns:
        Mean loss of the steps in nats, and the state to keep.
    """

    def plain(rows: Tensor) -> Tensor:
        return cross_entropy(network, data.inputs[rows], data.labels[rows])

    optimizer, named = descent(network, cfg, lr), trained(network)
    for name, buffer in state.get("momentum", {}).items():
        optimizer.state[named[name]]["momentum_buffer"] = buffer.clone().to(data.inputs.device)
    loss = descend(network, data, cfg, loss_of or plain, optimizer, rng=rng)
    buffers = {name: optimizer.state[p].get("momentum_buffer") for name, p in named.items()}
    momentum = {name: value for name, value in buffers.items() if value is not None}
    kept = {"network": sent(network.state_dict())}
    return loss, {**kept, "momentum": sent(momentum)} if momentum else kept
