"""FedEnsemble: FedAvg's training, and all clients' networks as a result."""

from typing import Any

import torch
from federation import DirectClients, skewed

from vestige.core.federation import ClientUpdate
from vestige.core.types import InputSpec
from vestige.methods.fedavg import FedAvg, FedAvgConfig
from vestige.methods.fedensemble import FedEnsemble, FedEnsembleConfig
from vestige.models.factory import build_model
from vestige.tasks.classification import Classification
from vestige.training.context import RunContext

SPEC = InputSpec.image(1, 8, 8)


class Remembering(DirectClients):
    """Clients whose last answers are kept."""

    def ask(self, *args: Any, **kwargs: Any) -> list[ClientUpdate]:
        found = super().ask(*args, **kwargs)
        self.last = {**getattr(self, "last", {}), **{one.partition: one for one in found}}
        return found


def run(method: Any, config: Any, **settings: Any) -> Any:
    clients = Remembering(skewed(4, SPEC.shape, 3))
    torch.manual_seed(0)
    net = build_model("convnet", SPEC, 3, widths=[4])
    cfg = config(**{"rounds": 3, "active": 2, "batch_size": 8, "client_lr": 0.05, **settings})
    made = method(cfg, Classification(SPEC, 3), [], net, {"clients": clients})
    clients.client = made.client
    ctx = RunContext(
        seed=0,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=lambda: True,
    )
    list(made.run(ctx))
    return made


def test_its_global_network_is_fedavgs():
    plain, ours = run(FedAvg, FedAvgConfig), run(FedEnsemble, FedEnsembleConfig)
    one, other = plain.student.state_dict(), ours.student.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_its_result_sums_the_networks_of_the_last_time_each_client_was_asked():
    method = run(FedEnsemble, FedEnsembleConfig)
    last = method.clients.last
    # Two of four are asked in three rounds; somebody twice.
    assert len(method.clients.asked) == 6 and 2 < len(last) <= 4
    inputs = torch.randn(5, *SPEC.shape, generator=torch.Generator().manual_seed(3))
    net = build_model("convnet", SPEC, 3, widths=[4]).eval()
    total = torch.zeros(5, 3)
    for update in last.values():
        net.load_state_dict(dict(update.arrays["model"]))
        total += net(inputs).detach()
    result = method.result()
    assert result.kind == "ensemble"
    torch.testing.assert_close(result.object(inputs), total)
    assert method.ensemble.filled.nonzero().flatten().tolist() == sorted(last)
