"""Invariants of FedD2S as its module defines it; the paper's text was not at hand."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from federation import DirectClients, skewed
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.federation import Ask, ClientUpdate
from vestige.core.types import Batch, InputSpec, Step
from vestige.errors import RecipeError
from vestige.federated.uploads import pooled
from vestige.methods.fedd2s import FedD2S, FedD2SConfig
from vestige.methods.local_only import LocalOnly, LocalOnlyConfig
from vestige.models.blocks import Blocks
from vestige.models.classifiers import BlockCNN
from vestige.tasks.classification import Classification
from vestige.training.context import RunContext

SPEC = InputSpec.image(1, 8, 8)
CLASSES = 3
SMALL = {"rounds": 4, "batch_size": 8, "client_lr": 0.05, "head_lr": 0.05}


def network() -> nn.Module:
    torch.manual_seed(0)
    return BlockCNN(1, CLASSES, size=(8, 8), widths=(4, 4, 4), hidden=6, groups=2)


def make(count: int = 3, student: nn.Module | None = None, **settings: Any) -> FedD2S:
    clients = DirectClients(skewed(count, SPEC.shape, CLASSES))
    cfg = FedD2SConfig(**{**SMALL, **settings})
    student = student or network()
    method = FedD2S(cfg, Classification(SPEC, CLASSES), [], student, {"clients": clients})
    clients.client = method.client
    return method


def context() -> RunContext:
    return RunContext(
        seed=0,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=lambda: True,
    )


def run(method: Any) -> list[Step]:
    return list(method.run(context()))


def asked(kind: str, cut: int, arrays: Any = None, partition: int = 0) -> Ask:
    return Ask(kind, 0, partition, arrays or {}, {"cut": cut}, seed=1)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Blocks of which some weight is another one."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def head_of(method: FedD2S, cut: int) -> dict[str, Tensor]:
    return weights(method.heads[cut])


BLOCK = ["block1", "block2", "block3", "block4", "classifier"]


# The schedule


def test_cuts_move_from_deep_to_shallow_and_stay_at_the_last():
    cuts = (4, 3, 2, 1)
    found = [FedD2SConfig().cut(number, cuts) for number in range(70)]
    assert found == [4] * 15 + [3] * 15 + [2] * 15 + [1] * 25
    never = FedD2SConfig(drop_every=None)
    assert {never.cut(number, cuts) for number in range(1000)} == {4}
    assert {FedD2SConfig().cut(number, (1,)) for number in range(70)} == {1}
    assert [FedD2SConfig(drop_every=2).cut(n, (3, 1)) for n in range(6)] == [3, 3, 1, 1, 1, 1]


def test_the_cut_comes_with_the_message_whoever_was_asked_before():
    method = make(drop_every=1, active=1)
    run(method)
    cuts = [(ask.round, ask.settings["cut"]) for ask in method.clients.asked]
    assert cuts == [(number, 4 - number) for number in range(4) for _ in ("upload", "train")]
    # Some client was first asked after the first cut had passed.
    assert len({ask.partition for ask in method.clients.asked}) > 1


def test_dropping_sets_that_mean_nothing_are_refused():
    for cuts in ([1, 2], [2, 2], []):
        with pytest.raises(ValueError, match="expected cuts from deep to shallow"):
            FedD2SConfig(dropping_set=cuts)
    for cut in (5, 0):
        with pytest.raises(RecipeError, match=f"got cut {cut} of 5 blocks, expected 1 to 4"):
            make(dropping_set=[cut])
    with pytest.raises(ValueError, match="without feature_clip"):
        FedD2SConfig(feature_noise=1.0)


# What leaves a client


def test_an_upload_is_what_the_personal_network_says_of_its_own_examples():
    method = make(half_precision=False, warmup_epochs=0, temperature=2.0)
    data = method.clients.parts[0]
    own = network().eval()
    for cut in (4, 3, 2, 1):
        answer = method.client.answer(asked("upload", cut), data, {})
        assert answer.state is None
        assert set(answer.arrays) == {"upload"}
        found = answer.arrays["upload"]
        assert set(found) == {"features", "soft_labels", "labels", "rows"}
        assert not any(value.requires_grad for value in found.values())
        assert torch.equal(found["rows"], torch.arange(len(data)))
        assert torch.equal(found["labels"], data.labels)
        with torch.no_grad():
            trunk, _ = Blocks(own).split_at(cut)
            assert torch.equal(found["features"], trunk(data.inputs))
            torch.testing.assert_close(found["soft_labels"], F.softmax(own(data.inputs) / 2, 1))


def test_neither_inputs_nor_weights_are_ever_sent():
    method = make(drop_every=1)
    client, answers = method.client, []

    class Watched:
        def answer(self, *given: Any) -> Any:
            answers.append((given[0].kind, client.answer(*given)))
            return answers[-1][1]

    method.clients.client = Watched()
    run(method)
    inputs = {tuple(part.inputs.shape[1:]) for part in method.clients.parts}
    for kind, answer in answers:
        if kind == "train":
            assert answer.arrays == {}
            continue
        assert set(answer.arrays["upload"]) == {"features", "soft_labels", "labels", "rows"}
        assert tuple(answer.arrays["upload"]["features"].shape[1:]) not in inputs
    assert {kind for kind, _ in answers} == {"upload", "train"}
    # And no client gets what another one made: the head alone.
    groups = {frozenset(ask.arrays) for ask in method.clients.asked}
    assert groups == {frozenset(), frozenset({"head"})}


def test_fewer_examples_are_drawn_anew_and_keep_their_numbers():
    method = make(upload_examples=5, warmup_epochs=0, half_precision=False)
    data = method.clients.parts[0]
    whole = method.client.answer(asked("upload", 2), data, {}).arrays["upload"]
    rows = whole["rows"]
    assert len(rows) == 5 and rows.unique().numel() == 5
    everything = make(warmup_epochs=0, half_precision=False)
    full = everything.client.answer(asked("upload", 2), data, {}).arrays["upload"]
    torch.testing.assert_close(whole["features"], full["features"][rows])
    assert torch.equal(whole["labels"], data.labels[rows])
    other = Ask("upload", 1, 0, {}, {"cut": 2}, seed=2)
    assert not torch.equal(method.client.answer(other, data, {}).arrays["upload"]["rows"], rows)


def test_a_client_warms_up_once_and_keeps_it():
    method = make(warmup_epochs=2)
    data = method.clients.parts[0]
    state = method.client.answer(asked("upload", 4), data, {}).state
    assert changed(weights(network()), state["network"]) == set(BLOCK)
    assert set(state["momentum"]) == {name for name, _ in network().named_parameters()}
    assert method.client.answer(asked("upload", 4), data, state).state is None


# Local to global


def test_the_server_trains_the_blocks_behind_the_cut_alone():
    for cut in (4, 2):
        method = make(rounds=2, dropping_set=[cut])
        before = weights(method.student)
        run(method)
        assert changed(before, weights(method.student)) == set(BLOCK[cut:])


def test_blocks_that_join_start_from_their_weights_and_are_trained_from_then_on():
    method = make(rounds=2, drop_every=1, dropping_set=[4, 3])
    before = weights(method.student)
    seen = [changed(before, weights(method.student)) for _ in method.run(context())]
    # In each round three batches of 72 uploads, and the clients' step.
    assert seen == [{"classifier"}] * 4 + [{"block4", "classifier"}] * 4


def batch_of(method: FedD2S, rows: int = 6, *, one_hot: bool = False) -> Batch:
    rng = torch.Generator().manual_seed(2)
    labels = torch.arange(rows) % CLASSES
    soft = torch.softmax(torch.randn(rows, CLASSES, generator=rng), 1)
    soft = F.one_hot(labels, CLASSES).float() if one_hot else soft
    features = torch.randn(rows, *method.shapes[2], generator=rng)
    return Batch(features, labels, extra={"soft_labels": soft})


def test_the_heads_loss_is_cross_entropy_and_kl_written_out():
    method = make(head_weight=0.7, temperature=2.0)
    batch = batch_of(method)
    head = method.heads[3]
    loss = method.imitation(head, batch)
    logits = head(batch.inputs).detach().double()
    total = 0.0
    for row in range(len(batch)):
        hard = torch.exp(logits[row]) / torch.exp(logits[row]).sum()
        soft = torch.exp(logits[row] / 2) / torch.exp(logits[row] / 2).sum()
        p = batch.extra["soft_labels"][row].double()
        apart = sum(float(p[c]) * math.log(float(p[c] / soft[c])) for c in range(CLASSES))
        total += (-math.log(float(hard[batch.labels[row]])) + 0.7 * 4 * apart) / len(batch)
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-5)


def test_a_head_without_distillation_is_a_supervised_one_and_one_hot_labels_are_cross_entropy():
    plain = make(head_weight=0.0)
    batch = batch_of(plain)
    loss = plain.imitation(plain.heads[3], batch).total
    assert torch.equal(loss, F.cross_entropy(plain.heads[3](batch.inputs), batch.labels))
    method = make(temperature=1.0)
    terms = method.imitation(method.heads[3], batch_of(method, one_hot=True)).terms
    torch.testing.assert_close(terms["distillation"], terms["cross_entropy"])


def uploaded(partition: int, rows: list[int]) -> ClientUpdate:
    number = torch.tensor(rows)
    arrays = {
        "features": (10.0 * partition + number).view(-1, 1).half(),
        "soft_labels": F.one_hot(number % CLASSES, CLASSES).float(),
        "labels": number % CLASSES,
        "rows": number,
    }
    return ClientUpdate(partition, {"upload": arrays}, len(rows), torch.zeros(CLASSES), {})


def test_neither_the_order_of_clients_nor_of_their_examples_matters():
    device = torch.device("cpu")
    first = pooled([uploaded(0, [0, 1, 2]), uploaded(1, [3, 4])], device)
    second = pooled([uploaded(1, [4, 3]), uploaded(0, [2, 0, 1])], device)
    assert first.inputs.flatten().tolist() == [0, 1, 2, 13, 14]
    assert first.inputs.dtype == torch.float32
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.extra["soft_labels"], second.extra["soft_labels"])


def test_the_head_tells_apart_what_no_client_has_seen_together():
    parts = skewed(2, SPEC.shape, 2, each=40)
    pure = [
        replace(part, inputs=part.inputs[keep], labels=part.labels[keep])
        for number, part in enumerate(parts)
        for keep in [part.labels == number]
    ]
    clients = DirectClients(pure)
    torch.manual_seed(0)
    student = BlockCNN(1, 2, size=(8, 8), widths=(4, 4, 4), hidden=6, groups=2)
    cfg = FedD2SConfig(**{**SMALL, "rounds": 1}, dropping_set=[3], head_epochs=8)
    method = FedD2S(cfg, Classification(SPEC, 2), [], student, {"clients": clients})
    clients.client = method.client
    seen: list[ClientUpdate] = []
    ask = clients.ask

    def listening(kind: str, *given: Any, **named: Any) -> list[ClientUpdate]:
        found = ask(kind, *given, **named)
        seen.extend(found if kind == "upload" else [])
        return found

    clients.ask = listening
    run(method)
    pool = pooled(seen, torch.device("cpu"))
    with torch.no_grad():
        right = method.heads[3].eval()(pool.inputs).argmax(1) == pool.labels
    for label in (0, 1):
        assert right[pool.labels == label].float().mean() > 0.8


def test_uploads_that_do_not_fit_together_are_left_out(caplog):
    method = make(rounds=1, warmup_epochs=0)
    client = method.client

    class Careless:
        def answer(self, ask: Ask, data: Any, state: Any) -> Any:
            found = client.answer(ask, data, state)
            if ask.partition == 1 and ask.kind == "upload":
                found.arrays["upload"]["labels"][0] = CLASSES
            if ask.partition == 2 and ask.kind == "upload":
                found.arrays["upload"]["labels"] = found.arrays["upload"]["labels"][1:]
            return found

    method.clients.client = Careless()
    run(method)
    trained = [ask.partition for ask in method.clients.asked if ask.kind == "train"]
    assert trained == [0]
    assert "client 1 is left out" in caplog.text and "client 2 is left out" in caplog.text


# Global to local


def trained(method: FedD2S, cut: int, **sent_in: Any) -> dict[str, Tensor]:
    """A client's network after its training."""
    arrays = sent_in or {"head": head_of(method, cut)}
    data = method.clients.parts[0]
    return method.client.answer(asked("train", cut, arrays), data, {}).state["network"]


def silence(monkeypatch: pytest.MonkeyPatch, *, every: int) -> None:
    """The cross-entropy of the client's own network, the first of `every` in a step, is mute."""
    real, calls = F.cross_entropy, []

    def mute(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        loss = real(logits, labels)
        return loss if (len(calls) - 1) % every else 0.0 * loss

    monkeypatch.setattr("vestige.methods.fedd2s.F.cross_entropy", mute)


@pytest.mark.parametrize("cut", [4, 3, 2, 1])
def test_advice_reaches_the_blocks_before_the_cut_alone(cut, monkeypatch):
    silence(monkeypatch, every=2)
    method = make(client_momentum=0.0, dropping_set=[cut], local_steps=2)
    head = {
        name: value + 0.3 * torch.randn(value.shape) for name, value in head_of(method, cut).items()
    }
    before = {name: value.clone() for name, value in head.items()}
    after = trained(method, cut, head=head)
    assert changed(weights(network()), after) == set(BLOCK[:cut])
    # No client trains the head that it was sent.
    assert not changed(before, head)


@pytest.mark.parametrize("cut", [4, 1])
def test_soft_labels_reach_the_blocks_before_the_cut_alone(cut, monkeypatch):
    silence(monkeypatch, every=1)
    method = make(client_momentum=0.0, dropping_set=[cut], transport="soft-labels", local_steps=2)
    count = len(method.clients.parts[0])
    soft = torch.softmax(torch.randn(count, CLASSES), 1)
    after = trained(method, cut, advice={"soft_labels": soft, "rows": torch.arange(count)})
    assert changed(weights(network()), after) == set(BLOCK[:cut])


def test_the_head_is_frozen_at_a_client_whatever_it_was_at_the_server():
    method = make()
    method.student.train()
    head = method.client.head(asked("train", 2, {"head": head_of(method, 2)}))
    assert not any(layer.training for layer in head.modules())
    assert not any(weight.requires_grad for weight in head.parameters())
    assert list(head.state_dict()) == [
        name for name in network().state_dict() if name.split(".")[0] in BLOCK[2:]
    ]


def test_own_labels_train_every_block():
    method = make(client_weight=0.0, local_steps=1)
    assert changed(weights(network()), trained(method, 2)) == set(BLOCK)


@pytest.mark.parametrize("transport", ["head", "soft-labels"])
def test_a_clients_step_is_the_loss_written_out(transport):
    settings = {"client_weight": 0.6, "temperature": 2.0, "local_steps": 1, "client_momentum": 0.0}
    method = make(**settings, batch_size=24, transport=transport)
    data, cut = method.clients.parts[0], 3
    trunk, tail = Blocks(network()).split_at(cut)
    head = copy.deepcopy(method.heads[cut])
    with torch.no_grad():
        head.classifier.bias.add_(torch.tensor([1.0, 0.0, -1.0]))
    soft = torch.softmax(torch.randn(len(data), CLASSES), 1)
    if transport == "head":
        sent_in = {"head": weights(head)}
    else:
        sent_in = {"advice": {"soft_labels": soft, "rows": torch.arange(len(data))}}
    answer = method.client.answer(asked("train", cut, sent_in), data, {})

    representation = trunk(data.inputs)
    logits = tail(representation)
    q = soft
    if transport == "head":
        advice = head(representation)
        q = torch.softmax(advice / 2, 1).detach()
    apart = (q * (q.log() - torch.log_softmax(logits / 2, 1))).sum(1).mean() * 4
    near = dict(trunk.named_parameters())
    distant = dict(tail.named_parameters())
    told = F.cross_entropy(advice, data.labels) if transport == "head" else torch.zeros(())
    plain = F.cross_entropy(logits, data.labels)
    # The KL term and the head's reach the trunk; the client's own labels reach all.
    for group, loss in ((near, plain + 0.6 * (told + apart)), (distant, plain)):
        slopes = torch.autograd.grad(loss, list(group.values()), retain_graph=True)
        for (name, weight), slope in zip(group.items(), slopes, strict=True):
            torch.testing.assert_close(
                answer.state["network"][name], weight.detach() - 0.05 * slope, rtol=1e-4, atol=1e-6
            )
    whole = float((plain + 0.6 * (told + apart)).detach())
    assert answer.metrics["client_loss"] == pytest.approx(whole, rel=1e-5)


def test_without_advice_it_is_local_only():
    settings = {**SMALL, "client_momentum": 0.9}
    ours = make(client_weight=0.0, warmup_epochs=0)
    run(ours)
    alone = DirectClients(skewed(3, SPEC.shape, CLASSES))
    local = LocalOnly(
        LocalOnlyConfig(**{name: settings[name] for name in settings if name != "head_lr"}),
        Classification(SPEC, CLASSES),
        [],
        network(),
        {"clients": alone},
    )
    alone.client = local.client
    run(local)
    for number in range(3):
        for group in ("network", "momentum"):
            first, second = ours.clients.states[number][group], alone.states[number][group]
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first)


def test_soft_labels_find_their_examples_whatever_the_loader_does():
    method = make(transport="soft-labels", upload_examples=7, rounds=1)
    run(method)
    trained = [ask for ask in method.clients.asked if ask.kind == "train"]
    assert len(trained) == 3
    for ask in trained:
        # Only its own, with the numbers under which it sent them.
        advice = ask.arrays["advice"]
        upload = next(
            one
            for one in method.clients.asked
            if one.kind == "upload" and one.partition == ask.partition
        )
        data = method.clients.parts[ask.partition]
        again = method.client.answer(upload, data, {}).arrays["upload"]
        assert torch.equal(advice["rows"], again["rows"])
        with torch.no_grad():
            logits = method.heads[4].eval()(again["features"].float())
        wanted = torch.softmax(logits / method.cfg.temperature, 1)
        torch.testing.assert_close(advice["soft_labels"], wanted)


def test_examples_without_soft_labels_learn_from_their_labels_alone():
    settings = {"local_steps": 1, "batch_size": 24, "client_momentum": 0.0}
    method = make(transport="soft-labels", **settings)
    nothing = {"soft_labels": torch.empty(0, CLASSES), "rows": torch.empty(0, dtype=torch.int64)}
    found = trained(method, 3, advice=nothing)
    alone = trained(make(client_weight=0.0, **settings), 3)
    for name, value in alone.items():
        # Rounding of a sum with a zero.
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7)


# What stays with a client


def test_a_client_is_judged_by_its_own_network_and_not_by_the_global_one():
    method = make()
    run(method)
    arrays, settings = method.offer()
    assert not arrays and not settings
    judged = [
        weights(method.client.judged(asked("test", 4), method.clients.states[number]))
        for number in range(3)
    ]
    assert changed(judged[0], judged[1]) == set(BLOCK)
    # Who has not been asked yet has what all start from.
    fresh = weights(method.client.judged(asked("test", 4), {}))
    assert not changed(fresh, weights(network()))
    assert method.result().kind == "personal models"


def test_void_rounds_leave_everything_as_it_was():
    method = make()
    before = weights(method.student)
    method.clients.ask = lambda *given, **named: []
    assert run(method) == []
    assert not changed(before, weights(method.student))


def test_statistics_of_batchnorm_stay_with_each_client():
    def normed() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
            nn.Sequential(nn.Linear(144, 6), nn.BatchNorm1d(6), nn.ReLU()),
            nn.Linear(6, CLASSES),
        )

    method = make(student=normed())
    run(method)
    means = [state["network"]["0.1.running_mean"] for state in method.clients.states.values()]
    assert not torch.equal(means[0], means[1])
    # Nothing runs through the trunk of the global network.
    assert not method.student[0][1].running_mean.any()
    frozen = make(student=normed(), bn_policy="frozen")
    run(frozen)
    assert not frozen.clients.states[0]["network"]["0.1.running_mean"].any()
