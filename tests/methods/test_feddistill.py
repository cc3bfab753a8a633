"""FedDistill's invariants: what is averaged, and what is asked of a client."""

from typing import Any

import pytest
import torch
from federation import DirectClients, skewed
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.federation import Ask, sent
from vestige.core.types import InputSpec
from vestige.methods.fedavg import FedAvg, FedAvgConfig
from vestige.methods.feddistill import FedDistill, FedDistillConfig
from vestige.models.factory import build_model
from vestige.tasks.classification import Classification
from vestige.training.context import RunContext

SPEC = InputSpec.image(1, 8, 8)
TRAINING: dict[str, Any] = {
    "rounds": 3,
    "active": 3,
    "batch_size": 8,
    "local_steps": 3,
    "client_lr": 0.05,
    "client_lr_decay": 0.99,
}


def make(method: Any = FedDistill, config: Any = FedDistillConfig, **settings: Any) -> Any:
    clients = DirectClients(skewed(4, SPEC.shape, 3))
    torch.manual_seed(0)
    net = build_model("convnet", SPEC, 3, widths=[4])
    cfg = config(**{**TRAINING, **settings})
    made = method(cfg, Classification(SPEC, 3), [], net, {"clients": clients})
    clients.client = made.client
    return made


def run(method: Any) -> Any:
    ctx = RunContext(
        seed=0,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=lambda: True,
    )
    list(method.run(ctx))
    return method


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("base", ["fedavg", "scaffold"])
def test_with_shared_weights_and_without_its_term_it_is_the_base_algorithm(base):
    plain = run(make(FedAvg, FedAvgConfig, base=base))
    ours = run(make(share_weights=True, distillation_weight=0, base=base))
    assert same(state_of(plain.student), state_of(ours.student))


def test_the_first_round_has_no_term_and_the_second_has():
    for rounds, equal in ((1, True), (2, False)):
        plain = run(make(FedAvg, FedAvgConfig, rounds=rounds))
        ours = run(make(share_weights=True, rounds=rounds))
        assert same(state_of(plain.student), state_of(ours.student)) == equal


def test_without_shared_weights_no_weight_leaves_a_client():
    method = make(active=4)
    before = state_of(method.student)
    run(method)
    for ask in method.clients.asked:
        assert ask.arrays.keys() == ({"class-logits"} if ask.round else set())
    assert same(before, state_of(method.student))
    ask = Ask("judge", 3, 0, method.offer()[0], {}, 0)
    own = [state_of(method.client.judged(ask, method.clients.states[k])) for k in range(4)]
    assert not same(own[0], own[1])
    assert same(own[0], dict(method.clients.states[0]["own"]))
    assert same(before, state_of(method.client.judged(ask, {})))


def test_a_client_trains_alone_where_nothing_is_asked_of_it():
    together, alone = make(active=4, distillation_weight=0), make(active=4, distillation_weight=0)
    alone.clients.parts[1:] = alone.clients.parts[1:][::-1]
    run(together)
    run(alone)
    # Whatever the others hold.
    one, other = (method.clients.states[0]["own"] for method in (together, alone))
    assert same(dict(one), dict(other))


def test_a_client_sends_the_mean_logits_of_what_it_drew():
    method = make(batch_size=24, local_steps=1)
    part = method.clients.parts[0]
    part.labels[part.labels == 2] = 1
    found = method.client.answer(Ask("train", 0, 0, {}, {}, 3), part, {})
    logits = method.client.network.train()(part.inputs)
    means = found.arrays["class-logits"]["means"]
    for label in (0, 1):
        expected = logits[part.labels == label].mean(0)
        torch.testing.assert_close(means[label], expected, rtol=1e-4, atol=1e-5)
    assert not means[2].any()
    assert found.counts.tolist() == part.counts().tolist()


def test_the_loss_is_the_papers_and_spares_classes_that_nobody_has():
    method = make(batch_size=24, local_steps=1, client_lr=0.5, distillation_weight=2.0)
    part = method.clients.parts[0]
    means = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    ask = Ask("train", 1, 0, {"class-logits": sent({"means": means})}, {"labels": [0, 1]}, 3)
    found = method.client.answer(ask, part, {})
    log_probs = F.log_softmax(method.client.network.train()(part.inputs), 1)
    target = F.softmax(means, 1)[part.labels]
    apart = (target * (target.log() - log_probs)).sum(1) * (part.labels != 2)
    assert found.metrics["cross_entropy"] == pytest.approx(
        F.nll_loss(log_probs, part.labels).item(), rel=1e-5
    )
    assert found.metrics["distillation"] == pytest.approx(2 * apart.mean().item(), rel=1e-5)


def test_a_base_algorithm_without_shared_weights_is_refused():
    with pytest.raises(ValidationError, match="averages no networks"):
        FedDistillConfig(base="feddyn")
