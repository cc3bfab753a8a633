"""Training at one client: batches, the steps, and what a base algorithm adds to a gradient."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from vestige.core import modes
from vestige.core.federation import Arrays, ClientData, ClientUpdate, Payload, sent
from vestige.core.types import Loss, Requires, Role, predict

BatchNormPolicy = Literal["average", "local", "frozen"]
ClientLoss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Correction = Callable[[Mapping[str, nn.Parameter]], None]


class ClientTraining(BaseModel):
    """Settings of the clients' own training, the same for every federated method.

    Attributes:
        rounds: of communication.
        active: clients that are asked in each round; null asks all of them.
        local_steps: mini-batch steps of a client in a round; null goes by `local_epochs`.
        local_epochs: passes over a client's examples in a round.
        batch_size: of a client; one that holds fewer takes all it has.
        client_lr: of SGD, in the first round.
        client_lr_decay: per round.
        client_momentum: of SGD; starts anew in each round.
        client_weight_decay: of SGD.
        clip: largest norm of a client's gradient; null does not clip.
        bn_policy: "average" averages the running statistics of BatchNorm with the weights, "local"
            leaves them with each client (the global network then has those it started with), and
            "frozen" trains with those it started with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: int = Field(60, ge=1)
    active: int | None = Field(None, ge=1)
    local_steps: int | None = Field(None, ge=1)
    local_epochs: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)
    client_lr: float = Field(0.01, gt=0)
    client_lr_decay: float = Field(1.0, gt=0, le=1)
    client_momentum: float = Field(0.0, ge=0, lt=1)
    client_weight_decay: float = Field(0.0, ge=0)
    clip: float | None = Field(None, gt=0)
    bn_policy: BatchNormPolicy = "average"

    def rate(self, round: int) -> float:
        """A client's learning rate in `round`, from 0, whoever was asked before."""
        return float(self.client_lr * self.client_lr_decay**round)

    def steps_of(self, examples: int) -> int:
        """Steps that a client with so many examples takes in a round."""
        per_epoch = max(1, -(-examples // self.batch_size))
        return self.local_steps or self.local_epochs * per_epoch


def batches(count: int, size: int, steps: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Rows of `steps` mini-batches: shuffled passes over all rows, each row once per pass.

    The last batch of a pass may be smaller; a single row is drawn twice, since BatchNorm has no
    statistics of one.

    Args:
        count: rows, N >= 1.
        size: of a batch; more than N takes all of them.
        steps: batches in all.
        rng: the rows lie where it does.
    """
    taken = 0
    while taken < steps:
        for rows in torch.randperm(count, generator=rng, device=rng.device).split(size):
            if taken == steps:
                return
            taken += 1
            yield rows if len(rows) > 1 else rows.repeat(2)


def cross_entropy(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy (), with gradient."""
    return F.cross_entropy(predict(network, inputs).logits, labels)


def train_locally(
    network: nn.Module,
    data: ClientData,
    cfg: ClientTraining,
    *,
    lr: float,
    rng: torch.Generator,
    loss_fn: ClientLoss = cross_entropy,
    correction: Correction | None = None,
) -> float:
    """Train `network` in place by SGD on one client's examples.

    Args:
        network: on the device of the data; left in train mode.
        data: with at least one example.
        cfg: steps, batch size and everything else.
        lr: of this round.
        rng: on the CPU; draws the batches.
        loss_fn: of a batch; mean over it.
        correction: adds to the gradients, by the parameters' names, before they are clipped.

    Returns:
        Mean loss of the steps, in nats.
    """

    def of_rows(rows: Tensor) -> Tensor:
        return loss_fn(
            network, data.inputs.index_select(0, rows), data.labels.index_select(0, rows)
        )

    optimizer = descent(network, cfg, lr)
    return descend(network, data, cfg, of_rows, optimizer, rng=rng, correction=correction)


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take a gradient, by name."""
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def descent(network: nn.Module, cfg: ClientTraining, lr: float) -> torch.optim.SGD:
    """A client's SGD on `network`, without momentum yet."""
    return torch.optim.SGD(
        trained(network).values(),
        lr,
        momentum=cfg.client_momentum,
        weight_decay=cfg.client_weight_decay,
        foreach=True,
    )


def descend(
    network: nn.Module,
    data: ClientData,
    cfg: ClientTraining,
    loss_of: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    rng: torch.Generator,
    correction: Correction | None = None,
) -> float:
    """`train_locally` for a loss that goes by the rows of a batch, with an optimizer of its own.

    Args:
        network: as there.
        data: as there.
        cfg: as there.
        loss_of: of the examples in these rows, (B,), int64, on the device of the data.
        optimizer: on the parameters of `network`.
        rng: as there.
        correction: as there.
    """
    named = trained(network)
    modes.train_mode(network)
    if cfg.bn_policy == "frozen":
        freeze_statistics(network)
    total = torch.zeros((), device=data.inputs.device)
    steps = cfg.steps_of(len(data))
    for rows in batches(len(data), cfg.batch_size, steps, rng):
        loss = loss_of(rows.to(data.inputs.device))
        optimizer.zero_grad()
        loss.backward()
        if correction is not None:
            correction(named)
        if cfg.clip is not None:
            nn.utils.clip_grad_norm_(list(named.values()), cfg.clip)
        optimizer.step()
        total += loss.detach()
    return float(total) / steps


def freeze_statistics(network: nn.Module) -> None:
    """Put BatchNorm layers into eval mode; their scale and shift still train."""
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()


def statistics_of(network: nn.Module) -> set[str]:
    """Names in the state of the running statistics of BatchNorm layers."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in network.named_modules()
        if isinstance(layer, _BatchNorm)
        for name, _ in layer.named_buffers(recurse=False)
    }


def opened(network: nn.Module, model: Arrays, state: Payload, policy: BatchNormPolicy) -> None:
    """Load what the server sent into a client's network, with its own statistics if they stay."""
    network.load_state_dict(dict(model))
    own = state.get("statistics", {})
    if policy == "local" and own:
        network.load_state_dict(dict(own), strict=False)


def returned(network: nn.Module, policy: BatchNormPolicy) -> dict[str, Tensor]:
    """The part of a client's network that it sends back."""
    kept = statistics_of(network) if policy != "average" else set()
    return sent({name: value for name, value in network.state_dict().items() if name not in kept})


def own_statistics(network: nn.Module, policy: BatchNormPolicy) -> dict[str, dict[str, Tensor]]:
    """The group of a client's state that holds its statistics; none where they do not stay."""
    if policy != "local":
        return {}
    names, state = statistics_of(network), network.state_dict()
    return {"statistics": sent({name: state[name] for name in sorted(names)})}


def mean_loss(updates: Sequence[ClientUpdate]) -> Loss:
    """The clients' mean losses by their examples, for the curves.

    Terms that no more than half of them tell are left out: they are not the method's.
    """
    told = Counter(name for update in updates for name in update.metrics)
    terms = {}
    for name in (name for name, times in told.items() if 2 * times > len(updates)):
        parts = [(u.metrics[name], u.examples) for u in updates if name in u.metrics]
        total = sum(examples for _, examples in parts)
        terms[name] = torch.tensor(sum(value * examples for value, examples in parts) / total)
    return Loss(terms, torch.stack([torch.zeros(()), *terms.values()]).sum())


def needs_clients(*roles: Role) -> Requires:
    """What a method needs whose training happens at clients.

    It is closed to plug-ins, which wrap updates: most of its updates are made elsewhere.

    Args:
        roles: of the updates that the server makes, and "student" for what clients do.
    """
    return Requires(
        sources=("clients",),
        teachers=(0, 0),
        extras=("federated",),
        roles=roles,
        closed_to=("*",),
    )
