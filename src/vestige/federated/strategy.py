"""Data-free distillation as a strategy of Flower, for server apps that are written by hand.

A run of vestige does not need it: there a method asks its clients itself. Here Flower's own loop
drives, `strategy.start(grid, initial_arrays, num_rounds)`, with clients that run our `client_app`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from vestige.core import seeding
from vestige.core.federation import Arrays, ClientUpdate, sent, shapes
from vestige.errors import ContractError
from vestige.federated import records
from vestige.federated.bases import BaseTraining, ServerBase
from vestige.federated.local import mean_loss, returned
from vestige.federated.roster import Asked, Exchange, Roster

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg

# From the round, from 0, the averaged global state, and what clients sent, to the state to go on
# with.
ServerStep = Callable[[int, Arrays, Sequence[ClientUpdate]], Arrays]


def averaged(round: int, arrays: Arrays, updates: Sequence[ClientUpdate]) -> Arrays:
    """The server step of the base algorithms: none."""
    return arrays


def distill_strategy(
    network: nn.Module,
    cfg: BaseTraining,
    *,
    clients: int,
    num_classes: int,
    server_step: ServerStep = averaged,
    seed: int = 0,
    least: int = 1,
    join_timeout_s: float | None = None,
) -> "FedAvg":
    """A strategy for Flower: a base algorithm, and what the server makes of its average.

    Clients are sampled by their own numbers with a generator of the strategy's own, so that a run
    can be repeated; answers that are not as they must be are rejected by name. A round with fewer
    than `least` valid ones changes nothing. Clients are not asked to evaluate.

    Args:
        network: gives names, shapes and dtypes; never changed.
        cfg: of the base algorithm; `active` says how many clients are asked, and its `rounds` are
            not looked at.
        clients: N, all of them, numbered from 0.
        num_classes: C.
        server_step: changes the average, for example by distillation.
        seed: of the sampling and of what clients draw.
        least: valid answers that make a round.
        join_timeout_s: that new clients have to tell their numbers; None waits for all of them.

    Returns:
        A `FedAvg` of Flower. Its attribute `roster` holds the record of what was asked, and `base`
        what of the base algorithm a checkpoint has to hold.
    """
    from flwr.app import MetricRecord
    from flwr.serverapp.strategy import FedAvg

    class DistillStrategy(FedAvg):  # type: ignore[misc]
        """See `distill_strategy`."""

        def __init__(self) -> None:
            super().__init__(min_train_nodes=least, min_available_nodes=least)
            # Not in the constructor, where 0 is warned about.
            self.fraction_evaluate, self.min_evaluate_nodes = 0.0, 0
            self.roster = Roster(clients, num_classes, seed=seed, least=least)
            self.base = ServerBase(cfg, network, clients)
            self.rng = seeding.generator(seed, "clients")
            self.asked: Asked | None = None

        def configure_train(
            self, server_round: int, arrays: "ArrayRecord", config: "ConfigRecord", grid: "Grid"
        ) -> "list[Message]":
            """Ask this round's clients; settings in `config` go to them, too."""
            self.roster.meet(grid, join_timeout_s)
            sizes = self.roster.sizes()
            active = self.roster.sample(cfg.active or clients, self.rng)
            beside, settings = self.base.offer(sizes)
            self.asked = self.roster.written(
                Exchange(server_round - 1, "train", len(active)),
                "train",
                active,
                {"model": self._state(arrays), **beside},
                {**dict(config), **settings},
                expects={
                    "model": shapes(returned(network, cfg.bn_policy)),
                    **self.base.expects(),
                },
            )
            return self.asked.messages

        def aggregate_train(
            self, server_round: int, replies: "Sequence[Message]"
        ) -> "tuple[ArrayRecord | None, MetricRecord | None]":
            """Average, and take the server's step; nothing where the round is void."""
            asked = self.asked
            if asked is None or asked.exchange.round != server_round - 1:
                raise ContractError(
                    f"got answers of round {server_round}, which was not configured; call "
                    "configure_train first"
                )
            updates = self.roster.closed(asked, self.roster.read(asked, replies))
            if not updates:
                return None, None
            before = asked.arrays["model"]
            after = server_step(
                server_round - 1,
                self.base.aggregate(before, updates, self.roster.sizes()),
                updates,
            )
            # What the step is given and what it gives back goes on in the network's own dtypes.
            told = {name: float(value) for name, value in mean_loss(updates).terms.items()}
            return records.array_record(self._fitting(after)), MetricRecord(told)

        def _state(self, arrays: "ArrayRecord") -> dict[str, Any]:
            return self._fitting(records.read_arrays(arrays))

        def _fitting(self, arrays: Arrays) -> dict[str, Any]:
            like = sent(network.state_dict())
            if like.keys() != arrays.keys():
                raise ContractError(
                    f"got arrays {sorted(like.keys() ^ arrays.keys())[:3]} that only one of the "
                    "network and the global state has; start with the state of the network"
                )
            return {name: arrays[name].to(value.dtype) for name, value in like.items()}

    return DistillStrategy()
