"""FedGen's invariants, from the paper and its public code."""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from federation import DirectClients, skewed
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.federation import Ask, ClientUpdate
from vestige.core.types import Batch, InputSpec, Step
from vestige.errors import RecipeError
from vestige.federated.latents import GeneratedFeatures
from vestige.federated.terms import Terms
from vestige.methods.fedavg import FedAvg, FedAvgConfig
from vestige.methods.fedgen import FedGen, FedGenConfig
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
SMALL: dict[str, Any] = {"generator_steps": 3, "latent_dim": 6, "hidden_dim": 12}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("stride-cnn", SPEC, 3, widths=[2, 4], hidden_dim=5)


def make(parts: Any = None, **settings: Any) -> FedGen:
    clients = DirectClients(parts or skewed(4, SPEC.shape, 3))
    cfg = FedGenConfig(**{**TRAINING, **SMALL, **settings})
    method = FedGen(cfg, Classification(SPEC, 3), [], network(), {"clients": clients})
    clients.client = method.client
    return method


def averaged(**settings: Any) -> FedAvg:
    clients = DirectClients(skewed(4, SPEC.shape, 3))
    cfg = FedAvgConfig(**{**TRAINING, **settings})
    method = FedAvg(cfg, Classification(SPEC, 3), [], network(), {"clients": clients})
    clients.client = method.client
    return method


def context(seed: int = 0) -> RunContext:
    return RunContext(
        seed=seed,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=lambda: True,
    )


def run(method: Any, ctx: RunContext | None = None) -> list[Step]:
    return list(method.run(ctx or context()))


def asked(method: FedGen) -> list[Ask]:
    clients: Any = method.clients
    return clients.asked


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def told(method: FedGen, seed: int = 7) -> GeneratedFeatures:
    rng = torch.Generator().manual_seed(seed)
    return GeneratedFeatures(method.client.generator, [0, 1, 2], method.cfg.noise_of, rng)


def loss_of(method: FedGen, net: nn.Module, features: GeneratedFeatures | None, round: int) -> Any:
    """Loss of one batch at one client, and what was noted of it."""
    seen = Terms(3, "cpu")
    part = skewed(1, SPEC.shape, 3)[0]
    inputs, labels = part.inputs[:8], part.labels[:8]
    total = method.client.loss(net, inputs, labels, seen=seen, told=features, round=round)
    return total, seen, (inputs, labels)


# Limits in which it is FedAvg


@pytest.mark.parametrize("base", ["fedavg", "fedprox", "scaffold", "feddyn"])
def test_without_its_terms_it_is_the_base_algorithm_bit_for_bit(base):
    plain, ours = averaged(base=base), make(base=base, generated_weight=0, consistency_weight=0)
    losses = [step.loss.total for step in run(plain)]
    found = [step.loss.total for step in run(ours) if step.role == "student"]
    assert same(state_of(plain.student), state_of(ours.student))
    assert losses == found
    assert not same(state_of(ours.student), state_of(network()))


def test_the_first_round_is_fedavgs_whatever_the_weights_and_the_second_is_not():
    for rounds, equal in ((1, True), (2, False)):
        plain, ours = averaged(rounds=rounds), make(rounds=rounds)
        run(plain)
        run(ours)
        assert same(state_of(plain.student), state_of(ours.student)) == equal


def test_each_term_alone_changes_the_second_round():
    plain = averaged(rounds=2)
    run(plain)
    for off in ("generated_weight", "consistency_weight"):
        ours = make(rounds=2, **{off: 0})
        run(ours)
        assert not same(state_of(plain.student), state_of(ours.student))


# Schedules


def test_the_weights_decay_to_a_floor_that_does_not_wake_what_is_off():
    cfg = FedGenConfig()
    assert cfg.weight(10, 0) == 10
    assert cfg.weight(10, 1) == pytest.approx(9.8)
    assert cfg.weight(10, 10_000) == 1e-4
    assert cfg.weight(0, 5) == 0
    assert cfg.rate(100) == pytest.approx(3.660e-3, rel=1e-3)


def test_the_generators_rate_falls_by_rounds():
    rates, ctx = [], context()
    made = ctx.optimizer

    def watched(*args: Any, **kwargs: Any) -> Any:
        optimizer = made(*args, **kwargs)
        optimizer.register_step_pre_hook(
            lambda optimizer, args, kwargs: rates.append(optimizer.param_groups[0]["lr"])
        )
        return optimizer

    ctx.optimizer = watched  # type: ignore[method-assign]
    run(make(generator_lr=0.01, generator_lr_decay=0.5), ctx)
    assert rates == pytest.approx([0.01] * 3 + [0.005] * 3 + [0.0025] * 3)


def test_the_defaults_are_those_of_the_public_code_for_mnist():
    cfg = FedGenConfig()
    assert (cfg.rounds, cfg.local_steps, cfg.batch_size) == (200, 20, 32)
    assert (cfg.client_lr, cfg.client_lr_decay) == (0.01, 0.99)
    assert (cfg.generator_lr, cfg.generator_lr_decay, cfg.generator_weight_decay) == (
        3e-4,
        0.98,
        1e-2,
    )
    assert (cfg.generator_steps, cfg.generator_batch_size, cfg.generated_batch_size) == (50, 32, 32)
    assert (cfg.generated_weight, cfg.consistency_weight) == (10, 10)
    weights = cfg.ensemble_weight, cfg.adversarial_weight, cfg.diversity_weight
    assert weights == (1, 0, 1)
    assert cfg.differs == ""


# The client's step


def test_a_client_learns_from_the_generator_and_the_generator_from_no_client():
    method = make()
    features, net = told(method), network()
    before = state_of(method.client.generator)
    total, seen, _ = loss_of(method, net, features, 1)
    total.backward()
    assert same(before, state_of(method.client.generator))
    assert all(weight.grad is None for weight in method.client.generator.parameters())
    assert set(seen.means()) == {"cross_entropy", "consistency", "generated"}


def test_generated_features_move_the_head_alone():
    method = make(consistency_weight=0)
    with_it, without = network(), network()
    loss_of(method, with_it, told(method), 1)[0].backward()
    loss_of(method, without, None, 1)[0].backward()
    pairs = zip(with_it.named_parameters(), without.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        assert torch.equal(one.grad, other.grad) != name.startswith("classifier"), name


def test_the_loss_is_the_papers():
    method = make(batch_size=16, generated_batch_size=4)
    net = network()
    total, seen, (inputs, labels) = loss_of(method, net, told(method), 3)
    # The same draws, in the same order.
    again = told(method)
    target = F.softmax(net.classifier(again.of(labels)), 1)
    drawn = again.labels(4, torch.device("cpu"))
    generated = F.cross_entropy(net.classifier(again.of(drawn)), drawn)
    log_probs = F.log_softmax(net(inputs), 1)
    divergence = (target * (target.log() - log_probs)).sum(1).mean()
    weight = 10 * 0.98**3
    expected = F.nll_loss(log_probs, labels) + weight * (divergence + 4 / 16 * generated)
    torch.testing.assert_close(total, expected)
    assert sum(seen.means().values()) == pytest.approx(total.item(), rel=1e-5)


def test_what_examples_are_to_match_carries_no_gradient():
    method = make(generated_weight=0)
    net, other = network(), network()
    total, _, (inputs, labels) = loss_of(method, net, told(method), 1)
    total.backward()
    with torch.no_grad():
        target = F.softmax(other.classifier(told(method).of(labels)), 1)
    logits = other(inputs)
    constant = F.kl_div(F.log_softmax(logits, 1), target, reduction="batchmean")
    (F.cross_entropy(logits, labels) + 9.8 * constant).backward()
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


def test_labels_are_drawn_of_classes_that_are_known():
    method = make()
    rng = torch.Generator().manual_seed(0)
    features = GeneratedFeatures(method.client.generator, [2], method.cfg.noise_of, rng)
    assert features.labels(20, torch.device("cpu")).tolist() == [2] * 20


def test_uniform_noise_is_in_the_unit_interval_and_normal_noise_is_not():
    rng = torch.Generator().manual_seed(0)
    uniform = FedGenConfig().noise_of(200, rng)
    assert uniform.min() >= 0 and uniform.max() < 1
    # 6400 draws: five deviations of the mean of a uniform.
    assert abs(float(uniform.mean()) - 0.5) < 5 / math.sqrt(12 * 6400)
    assert FedGenConfig(noise="normal").noise_of(200, rng).min() < -1


def test_counts_are_of_labels_drawn_or_held():
    part = skewed(1, SPEC.shape, 3)[0]
    for steps in (3, 4):
        for counts in ("drawn", "held"):
            method = make(counts=counts, local_steps=steps)
            found = method.client.answer(Ask("train", 0, 0, method.offer()[0], {}, 3), part, {})
            # Three batches of eight from 24 examples are each example once.
            assert torch.equal(found.counts, part.counts()) == (steps == 3 or counts == "held")
            assert found.counts.sum() == (32 if steps == 4 and counts == "drawn" else 24)


# What travels


def test_the_generator_travels_from_the_second_round_on():
    method = make()
    run(method)
    for ask in asked(method):
        expected = {"model"} if ask.round == 0 else {"model", "generator"}
        assert ask.arrays.keys() == expected
        assert ("labels" in ask.settings) == (ask.round > 0)


def test_only_classes_that_a_client_had_are_known():
    parts = skewed(2, SPEC.shape, 3)
    for part in parts:
        part.labels[part.labels == 1] = 0
    method = make(parts, active=2)
    run(method)
    assert asked(method)[-1].settings["labels"] == [0, 2]
    assert method.seen.classes() == [0, 2]


class Silent(DirectClients):
    """Clients of which none answers in round 1."""

    def ask(self, kind: str, round: int, *args: Any, **kwargs: Any) -> list[ClientUpdate]:
        return [] if round == 1 else super().ask(kind, round, *args, **kwargs)


def test_a_void_round_changes_nothing():
    method = make(rounds=2)
    shorter = make(rounds=1)
    silent = Silent(method.clients.parts)  # type: ignore[attr-defined]
    silent.client, method.clients = method.client, silent
    assert len(run(method)) == len(run(shorter)) == 4
    assert same(state_of(method.student), state_of(shorter.student))
    for name, value in method.generator.named_parameters():
        assert torch.equal(value, shorter.generator.get_parameter(name))


# The server's step


def heads(count: int, width: int = 5) -> list[nn.Linear]:
    torch.manual_seed(3)
    return [nn.Linear(width, 3) for _ in range(count)]


def stacked(layers: Sequence[nn.Linear]) -> list[Tensor]:
    return [
        torch.stack([layer.weight.detach() for layer in layers]),
        torch.stack([layer.bias.detach() for layer in layers]),
    ]


COUNTS = torch.tensor([[6, 1, 0], [2, 0, 0], [0, 3, 9]])
LABELS = torch.tensor([0, 1, 2, 2, 0, 1, 1, 0])


def batch() -> Batch:
    rng = torch.Generator().manual_seed(5)
    return Batch(latent=torch.rand(8, 6, generator=rng), labels=LABELS)


@pytest.mark.parametrize("weighting", ["per_sample", "batch_mean"])
def test_the_generators_loss_is_a_loop_over_clients(weighting):
    method = make(label_weighting=weighting, diversity_weight=0.5, ensemble_weight=2)
    layers, drawn = heads(3), batch()
    shares = method.cfg.shares(COUNTS)
    loss = method.generation(method.generator, drawn, heads=stacked(layers), shares=shares)
    with torch.no_grad():
        features = method.generator(drawn.latent, drawn.labels)
        total = 0.0
        for client, layer in enumerate(layers):
            losses = F.cross_entropy(layer(features), LABELS, reduction="none")
            own = COUNTS[client][LABELS] / COUNTS.sum(0)[LABELS]
            per_sample = weighting == "per_sample"
            total += float((own * losses).mean() if per_sample else own.mean() * losses.mean())
        apart = torch.cdist(features, features, p=1) / 5
        noise = (drawn.latent[:, None] - drawn.latent[None]).square().mean(2)
        diversity = float(torch.exp(-(apart * noise).mean()))
    assert loss.terms["ensemble"].item() == pytest.approx(total, abs=1e-6)
    assert loss.terms["diversity"].item() == pytest.approx(diversity, abs=1e-6)
    assert loss.total.item() == pytest.approx(2 * total + 0.5 * diversity, abs=1e-5)


def test_pooled_logits_are_judged_once():
    method = make(objective="pooled_logits", label_weights="uniform")
    layers, drawn = heads(3), batch()
    shares = method.cfg.shares(COUNTS)
    loss = method.generation(method.generator, drawn, heads=stacked(layers), shares=shares)
    features = method.generator(drawn.latent, drawn.labels)
    mean = torch.stack([layer(features) for layer in layers]).mean(0)
    torch.testing.assert_close(loss.terms["ensemble"], F.cross_entropy(mean, LABELS))


def test_the_adversarial_term_is_maximised_against_the_global_head():
    plain, ours = make(), make(adversarial_weight=0.5)
    layers, drawn = heads(3), batch()
    shares = ours.cfg.shares(COUNTS)
    loss = ours.generation(ours.generator, drawn, heads=stacked(layers), shares=shares)
    without = plain.generation(ours.generator, drawn, heads=stacked(layers), shares=shares)
    features = ours.generator(drawn.latent, drawn.labels)
    answers = torch.stack([layer(features) for layer in layers])
    pooled = F.softmax((shares[:, LABELS, None] * answers).sum(0), 1)
    own = F.log_softmax(ours.student.classifier(features), 1)  # type: ignore[operator]
    divergence = F.kl_div(own, pooled, reduction="batchmean")
    torch.testing.assert_close(loss.total, without.total - 0.5 * divergence)


def test_a_generator_step_moves_the_generator_alone():
    method = make()
    net, client = state_of(method.student), state_of(method.client.network)
    generator = state_of(method.generator)
    steps = method.run(context())
    first = next(steps)
    assert first.role == "source"
    # Only the first update has been taken: the networks are not averaged yet.
    assert same(net, state_of(method.student)) and same(client, state_of(method.client.network))
    assert not same(generator, state_of(method.generator))
    assert all(weight.grad is None for weight in method.student.parameters())
    roles = [first.role, *(step.role for step in steps)]
    assert roles == (["source"] * 3 + ["student"]) * 3


def test_a_random_generator_stays_as_it_was_drawn():
    method = make(train_generator=False)
    before = state_of(method.generator)
    assert {step.role for step in run(method)} == {"student"}
    assert same(before, state_of(method.generator))
    assert method.variant() == "random generator"
    # And still it is used.
    assert "generator" in asked(method)[-1].arrays


def test_uniform_weights_read_no_counts():
    assert FedGenConfig(label_weights="uniform").shares(COUNTS).flatten().tolist() == (
        pytest.approx([1 / 3] * 9)
    )
    own = FedGenConfig(count_smoothing=1).shares(torch.tensor([[9], [0]]))
    assert own.flatten().tolist() == pytest.approx([10 / 11, 1 / 11])


def test_heads_that_know_one_class_each_teach_the_generator_all_of_them():
    # An expert tells its own class from the rest by one direction; of the others it knows nothing.
    torch.manual_seed(1)
    layers = []
    for label in range(3):
        layer = nn.Linear(5, 3)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        layer.weight.data[label] = torch.randn(5)
        layers.append(layer)
    method = make(generator_steps=100, generator_lr=1e-3, hidden_dim=32)
    ctx = context()
    updates = [
        ClientUpdate(
            label,
            {"model": {"classifier.weight": layer.weight.data, "classifier.bias": layer.bias.data}},
            9,
            9 * F.one_hot(torch.tensor(label), 3),
            {},
        )
        for label, layer in enumerate(layers)
    ]
    optimizer = method.cfg.optimizer(method.generator, ctx)
    losses = [float(step.loss.terms["ensemble"]) for step in method.learn(ctx, updates, optimizer)]
    means = [sum(losses[start : start + 20]) / 20 for start in range(0, 100, 20)]
    assert all(later < earlier for earlier, later in pairwise(means))
    labels = torch.arange(3).repeat(20)
    noise = method.cfg.noise_of(60, torch.Generator().manual_seed(9))
    features = method.generator.eval()(noise, labels)
    for label, layer in enumerate(layers):
        answers = layer(features[labels == label]).argmax(1)
        assert (answers == label).all()


# Lean: the head alone is sent


def test_the_lean_variant_sends_the_head_and_nothing_else():
    method = make(lean=True)
    extractor = {name: value for name, value in state_of(method.student).items() if "body" in name}
    run(method)
    clients: Any = method.clients
    head = {"classifier.weight", "classifier.bias"}
    for ask in asked(method):
        assert ask.arrays["model"].keys() == head
    after = state_of(method.student)
    # The global network has the averaged head on the extractor that it was made with.
    assert all(torch.equal(after[name], value) for name, value in extractor.items())
    assert not torch.equal(after["classifier.weight"], network().classifier.weight)
    kept = clients.states[0]["own"]
    assert kept.keys() == extractor.keys()
    assert all("body" in name for name in kept)


def test_a_lean_client_goes_on_from_its_own_extractor():
    method = make(lean=True, active=4)
    run(method)
    clients: Any = method.clients
    ask = Ask("judge", 3, 0, method.offer()[0], {}, 0)
    networks = [method.client.judged(ask, clients.states[number]) for number in (0, 1)]
    one, other = (state_of(net) for net in networks)
    assert torch.equal(one["classifier.weight"], other["classifier.weight"])
    assert torch.equal(one["classifier.weight"], method.student.state_dict()["classifier.weight"])
    assert torch.equal(one["body.0.weight"], clients.states[0]["own"]["body.0.weight"])
    assert not torch.equal(one["body.0.weight"], other["body.0.weight"])
    first = method.client.judged(ask, {})
    assert torch.equal(first.state_dict()["body.0.weight"], network().body[0].weight)


def test_in_the_first_round_a_lean_client_trains_as_any_other():
    lean, whole = make(lean=True, rounds=1), make(rounds=1)
    run(lean)
    run(whole)
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(lean.student.state_dict()[name], whole.student.state_dict()[name])


# What is refused


def test_settings_that_would_be_ignored_are_refused():
    for settings, said in (
        ({"lean": True, "base": "scaffold"}, "no global extractor"),
        ({"objective": "pooled_logits", "label_weighting": "batch_mean"}, "pooled per sample"),
        ({"label_weights": "uniform", "count_smoothing": 1}, "reads no counts"),
    ):
        with pytest.raises(ValidationError, match=said):
            FedGenConfig(**settings)


def test_a_network_without_a_linear_head_is_refused():
    clients = DirectClients(skewed(2, SPEC.shape, 3))
    net = nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten())
    with pytest.raises(RecipeError, match="without a linear layer of 3 outputs"):
        FedGen(FedGenConfig(), Classification(SPEC, 3), [], net, {"clients": clients})


def test_a_run_is_told_by_its_seed():
    first, again, other = (make() for _ in range(3))
    for method, seed in ((first, 0), (again, 0), (other, 1)):
        run(method, context(seed))
    assert same(state_of(first.student), state_of(again.student))
    assert not same(state_of(first.student), state_of(other.student))
    kept = copy.deepcopy(first.seen.state_dict())
    other.seen.load_state_dict(kept)
    assert other.seen.classes() == first.seen.classes() == [0, 1, 2]
