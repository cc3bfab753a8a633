"""Base algorithms that a federated method stands on: FedAvg, FedProx, SCAFFOLD and FedDyn.

Each has a half at the server, which averages, and a half at the client, which changes gradients.
With n~_k the number of a client's examples over the mean of all clients:

- FedAvg (McMahan et al., 2017): w = sum_k n_k theta_k / sum_k n_k.
- FedProx (Li et al., 2020): the client adds (mu / 2) ||theta - w||^2.
- SCAFFOLD (Karimireddy et al., 2020): the client adds <theta, c / n~_k - c_k>; afterwards
  c_k <- c_k - c + (w - theta_k) / (steps * lr); w <- g mean theta_k + (1 - g) w,
  c <- c + (1 / N) sum_k n~_k (change of c_k).
- FedDyn (Acar et al., 2021): the client adds (a / n~_k) (<theta, h_k - w> + ||theta||^2 / 2);
  afterwards h_k <- h_k + theta_k - w; w <- mean theta_k + (1 / N) sum over all clients of h_k.

The sums over n~_k are those of the public code of FedDyn and FedFTG (arXiv 2203.09249); with
clients of one size they are the papers' own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vestige.core.federation import Arrays, Ask, ClientUpdate, Payload, Settings, Shapes, sent
from vestige.federated.local import ClientTraining

BaseName = Literal["fedavg", "fedprox", "scaffold", "feddyn"]


class BaseTraining(ClientTraining):
    """Settings of clients that train by one of the base algorithms.

    Attributes:
        base: "fedavg", "fedprox", "scaffold" or "feddyn".
        proximal_weight: mu of FedProx. Higher holds clients nearer to the global network.
        dynamic_weight: a of FedDyn. Higher corrects a client's drift more.
        control_server_lr: g of SCAFFOLD, in (0, 1]. 1 takes the mean of the clients.
    """

    base: BaseName = "fedavg"
    proximal_weight: float = Field(1e-4, ge=0)
    dynamic_weight: float = Field(0.01, ge=0)
    control_server_lr: float = Field(1.0, gt=0, le=1)


def weighted_mean(states: Sequence[Arrays], weights: Sequence[float]) -> dict[str, Tensor]:
    """Mean of `states` by `weights`, which need not sum to 1, in the order given.

    Integer arrays, such as the counters of BatchNorm, are rounded; every dtype stays.
    """
    total = float(sum(weights))
    factors = [weight / total for weight in weights]
    found = {}
    for name, like in states[0].items():
        if like.is_floating_point():
            mean = states[0][name] * factors[0]
            for state, factor in zip(states[1:], factors[1:], strict=True):
                mean = mean + state[name] * factor
        else:
            parts = [s[name].double() * f for s, f in zip(states, factors, strict=True)]
            mean = torch.stack(parts).sum(0).round()
        found[name] = mean.to(like.dtype)
    return found


class ServerBase:
    """The server's half of a base algorithm; its state is that of the control variates.

    Args:
        cfg: which one, and its constants.
        network: names and shapes of the parameters.
        count: N, all clients of the federation.
    """

    def __init__(self, cfg: BaseTraining, network: nn.Module, count: int) -> None:
        self.cfg, self.count = cfg, count
        self.names = [name for name, value in network.named_parameters() if value.requires_grad]
        values = dict(network.named_parameters())
        kept = self.names if cfg.base in ("scaffold", "feddyn") else []
        # c of SCAFFOLD; the mean of h over all clients in FedDyn.
        self.control = {name: torch.zeros_like(values[name].detach().cpu()) for name in kept}

    def state_dict(self) -> dict[str, Any]:
        """The control variates."""
        return {"control": dict(self.control)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.control = dict(state["control"])

    def offer(self, sizes: Tensor) -> tuple[Payload, Settings]:
        """What goes to the clients beside the model."""
        mean = {"mean-examples": float(sizes.double().mean())}
        if self.cfg.base == "scaffold":
            return {"control": sent(self.control)}, mean
        return {}, mean if self.cfg.base == "feddyn" else {}

    def expects(self) -> Shapes:
        """What a client sends beside its model."""
        if self.cfg.base != "scaffold":
            return {}
        return {"control-change": {name: tuple(c.shape) for name, c in self.control.items()}}

    def aggregate(
        self, before: Arrays, updates: Sequence[ClientUpdate], sizes: Tensor
    ) -> dict[str, Tensor]:
        """The next global state; what the clients did not send stays as in `before`.

        Args:
            before: state that the clients started from, on the CPU.
            updates: at least one; in the order of the clients.
            sizes: as of `Clients.sizes`.
        """
        states = [update.arrays["model"] for update in updates]
        if self.cfg.base in ("fedavg", "fedprox"):
            weights = [float(update.examples) for update in updates]
            return {**before, **weighted_mean(states, weights)}
        means = weighted_mean(states, [1.0] * len(states))
        # Buffers, too, are those of the plain mean.
        after = {**before, **means}
        relative = [update.examples / float(sizes.double().mean()) for update in updates]
        for name in self.names:
            if self.cfg.base == "scaffold":
                share = self.cfg.control_server_lr
                after[name] = share * means[name] + (1 - share) * before[name]
                changes = [
                    size * update.arrays["control-change"][name]
                    for size, update in zip(relative, updates, strict=True)
                ]
            else:
                changes = [state[name] - before[name] for state in states]
            self.control[name] = self.control[name] + torch.stack(changes).sum(0) / self.count
            if self.cfg.base == "feddyn":
                after[name] = means[name] + self.control[name]
        return after


class ClientBase:
    """The client's half of a base algorithm, for one round.

    Args:
        cfg: which one, and its constants.
        ask: with what `ServerBase.offer` gave.
        network: with the global weights; its parameters are read as w.
        state: what `kept` gave the last time.
        examples: n_k.
    """

    def __init__(
        self, cfg: BaseTraining, ask: Ask, network: nn.Module, state: Payload, examples: int
    ) -> None:
        self.cfg = cfg
        named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.before = {name: value.detach().clone() for name, value in named.items()}
        device = next(iter(self.before.values())).device
        self.relative = examples / float(ask.settings.get("mean-examples", examples))  # type: ignore[arg-type]
        own = state.get("control", {})
        zeros = {name: torch.zeros_like(value) for name, value in self.before.items()}
        self.own = {name: own[name].to(device) if name in own else zeros[name] for name in zeros}
        control = ask.arrays.get("control", {})
        self.control = {name: value.to(device) for name, value in control.items()}

    def correct(self, named: Mapping[str, nn.Parameter]) -> None:
        """Add the algorithm's gradient to `.grad`."""
        cfg = self.cfg
        if cfg.base == "fedavg":
            return
        for name, value in named.items():
            grad = value.grad
            if grad is None:
                continue
            if cfg.base == "fedprox":
                grad.add_(value.detach() - self.before[name], alpha=cfg.proximal_weight)
            elif cfg.base == "scaffold":
                grad.add_(self.control[name] / self.relative - self.own[name])
            else:
                pull = self.own[name] - self.before[name] + value.detach()
                grad.add_(pull, alpha=cfg.dynamic_weight / self.relative)

    @torch.no_grad()
    def kept(self, network: nn.Module, *, steps: int, lr: float) -> tuple[Payload, Payload]:
        """What is sent beside the model, and what stays with the client.

        Args:
            network: after its training.
            steps: that it took.
            lr: that it took them with.
        """
        if self.cfg.base in ("fedavg", "fedprox"):
            return {}, {}
        now = {name: value for name, value in network.named_parameters() if name in self.before}
        if self.cfg.base == "feddyn":
            grown = {n: self.own[n] + now[n] - self.before[n] for n in self.before}
            return {}, {"control": sent(grown)}
        change = {
            name: (self.before[name] - now[name]) / (steps * lr) - self.control[name]
            for name in self.before
        }
        own = {name: self.own[name] + change[name] for name in change}
        return {"control-change": sent(change)}, {"control": sent(own)}
