"""What methods have in common whose clients do nothing but train the global network."""

import copy

import torch
from torch import Tensor, nn

from vestige.core.federation import (
    Answer,
    Ask,
    ClientData,
    Clients,
    ClientUpdate,
    Payload,
    sent,
    shapes,
)
from vestige.federated.bases import BaseTraining, ClientBase, ServerBase
from vestige.federated.local import opened, own_statistics, returned, train_locally


class TrainingClient:
    """Trains the global network on its own examples.

    Args:
        cfg: of its training and of the base algorithm.
        network: gives the form; never trained itself.
        counts: whether it also tells how many examples of each class it has.
    """

    def __init__(self, cfg: BaseTraining, network: nn.Module, *, counts: bool = False) -> None:
        self.cfg, self.network, self.counts = cfg, copy.deepcopy(network), counts

    def answer(self, ask: Ask, data: ClientData, state: Payload) -> Answer:
        """The trained network."""
        cfg = self.cfg
        network = self.judged(ask, state)
        base = ClientBase(cfg, ask, network, state, len(data))
        lr = cfg.rate(ask.round)
        loss = train_locally(
            network, data, cfg, lr=lr, rng=ask.rng("batches"), correction=base.correct
        )
        beside, kept = base.kept(network, steps=cfg.steps_of(len(data)), lr=lr)
        return Answer(
            {"model": returned(network, cfg.bn_policy), **beside},
            len(data),
            counts=data.counts().cpu() if self.counts else None,
            metrics={"cross_entropy": loss},
            state={**kept, **own_statistics(network, cfg.bn_policy)},
        )

    def judged(self, ask: Ask, state: Payload) -> nn.Module:
        """The global network, with this client's own statistics where they stay with it."""
        network = copy.deepcopy(self.network).to(ask.device)
        opened(network, ask.arrays["model"], state, self.cfg.bn_policy)
        return network


def train_round(
    clients: Clients, base: ServerBase, network: nn.Module, number: int, rng: torch.Generator
) -> tuple[list[ClientUpdate], dict[str, Tensor]]:
    """Have some clients train the global network, and average what they send.

    Args:
        clients: of which `base.cfg.active` are asked.
        base: algorithm; its control variates move on.
        network: global; read, not changed.
        number: of the round.
        rng: draws the clients.

    Returns:
        What came back, and the next state of the global network, on the CPU. Both are empty where
        the round is void: it then leaves everything as it was.
    """
    cfg = base.cfg
    active = clients.sample(cfg.active or clients.count, rng)
    before, sizes = sent(network.state_dict()), clients.sizes()
    beside, settings = base.offer(sizes)
    expects = {"model": shapes(returned(network, cfg.bn_policy)), **base.expects()}
    updates = clients.ask(
        "train", number, active, {"model": before, **beside}, settings, expects=expects
    )
    return updates, base.aggregate(before, updates, sizes) if updates else {}
