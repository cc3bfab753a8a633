"""FedFTG's invariants, from the paper's formulas and its public code."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import DirectClients, skewed
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.federation import ClientUpdate
from vestige.core.types import Batch, InputSpec, Step
from vestige.errors import ShapeError
from vestige.federated.local import freeze_statistics
from vestige.federated.stacked import ClientEnsemble, StackedNetworks
from vestige.methods.fedavg import FedAvg
from vestige.methods.fedftg import FedFTG, FedFTGConfig
from vestige.models.factory import build_model
from vestige.recipes.build import build_method
from vestige.tasks.classification import Classification
from vestige.training.context import RunContext
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.image(1, 8, 8)
TASK = Classification(SPEC, 3)
BASES = ("fedavg", "fedprox", "scaffold", "feddyn")
CLIENTS = {
    "rounds": 2,
    "local_epochs": 1,
    "batch_size": 8,
    "client_lr": 0.05,
    "client_lr_decay": 0.9,
    "clip": None,
    "client_weight_decay": 1e-3,
}
SMALL = {
    **CLIENTS,
    "iterations": 2,
    "student_steps": 2,
    "server_batch_size": 8,
    "generator_width": 4,
    "latent_dim": 8,
}


class Void(DirectClients):
    """Too few answer from the second round on."""

    def ask(self, kind: str, round: int, *args: Any, **named: Any) -> list[ClientUpdate]:
        updates = super().ask(kind, round, *args, **named)
        return updates if round == 0 else []


class Countless(DirectClients):
    """Nobody says how many examples of a class there are."""

    def ask(self, *args: Any, **named: Any) -> list[ClientUpdate]:
        updates = super().ask(*args, **named)
        return [replace(update, counts=torch.zeros_like(update.counts)) for update in updates]


def network(seed: int = 0, norm: str = "batch") -> nn.Module:
    torch.manual_seed(seed)
    made = build_model("convnet", SPEC, 3, widths=[4, 8], norm=norm)
    for layer in made.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = torch.randn(layer.num_features) * 0.3
            layer.running_var = torch.rand(layer.num_features) + 0.5
    return made


def make(
    student: nn.Module | None = None,
    clients: DirectClients | None = None,
    method: Any = FedFTG,
    **settings: Any,
) -> Any:
    clients = clients or DirectClients(skewed(3, SPEC.shape, 3, each=16))
    defaults = SMALL if method is FedFTG else CLIENTS
    torch.manual_seed(0)  # decides the generator's weights
    cfg = method.Config(**{**defaults, **settings})
    made = method(cfg, TASK, [], student or network(), {"clients": clients})
    clients.client = made.client
    return made


def context(on_round: Callable[[], bool] = lambda: True) -> RunContext:
    return RunContext(
        seed=0,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=on_round,
    )


def run(method: Any) -> list[Step]:
    return list(method.run(context()))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def ensemble_of(
    *networks: nn.Module, shares: Tensor | None = None, chunk: int = 2
) -> ClientEnsemble:
    """As `FedFTG.ensemble` makes it; by default every network has the same say."""
    stacked = StackedNetworks(networks[0], [n.state_dict() for n in networks], chunk=chunk)
    equal = torch.full((len(networks), 3), 1 / len(networks))
    return ClientEnsemble(stacked, equal if shares is None else shares, torch.ones(3) / 3)


def drawn(rows: int = 8) -> Batch:
    rng = torch.Generator().manual_seed(5)
    return Batch(latent=torch.randn(rows, 8, generator=rng), labels=torch.arange(rows) % 3)


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True))


def updates_of(*networks: nn.Module, counts: list[list[int]]) -> list[ClientUpdate]:
    return [
        ClientUpdate(k, {"model": state_of(one)}, sum(count), torch.tensor(count), {})
        for k, (one, count) in enumerate(zip(networks, counts, strict=True))
    ]


# What it reduces to


@pytest.mark.parametrize("off", [{"iterations": 0}, {"student_steps": 0}])
@pytest.mark.parametrize("base", BASES)
def test_without_fine_tuning_it_is_its_base_bit_for_bit(base, off):
    plain = make(method=FedAvg, base=base, active=2)
    tuned = make(base=base, active=2, **off)
    run(plain)
    steps = run(tuned)
    assert same(state_of(plain.student), state_of(tuned.student))
    assert same(plain.base.control, tuned.base.control)
    assert [step.role for step in steps].count("source") == (0 if "iterations" in off else 4)


@pytest.mark.parametrize("base", BASES)
def test_with_fine_tuning_it_is_not(base):
    plain, tuned = make(method=FedAvg, base=base), make(base=base)
    run(plain)
    run(tuned)
    assert not same(state_of(plain.student), state_of(tuned.student))


def test_the_average_is_kept_beside_what_was_made_of_it():
    plain, tuned = make(method=FedAvg, rounds=1), make(rounds=1)
    run(plain)
    run(tuned)
    assert same(state_of(plain.student), state_of(tuned.averaged))
    assert not same(state_of(tuned.student), state_of(tuned.averaged))
    assert not any(weight.requires_grad for weight in tuned.averaged.parameters())


@pytest.mark.parametrize("base", ["scaffold", "feddyn", "fedprox"])
def test_clients_and_server_refer_to_the_fine_tuned_network(base):
    method = make(base=base, rounds=2)
    ends: list[dict[str, Tensor]] = []
    ctx = context(lambda: ends.append(state_of(method.student)) or True)  # type: ignore[func-returns-value]
    before: list[Any] = []
    aggregate = method.base.aggregate
    method.base.aggregate = lambda start, *args: before.append(start) or aggregate(start, *args)
    list(method.run(ctx))
    asked = [ask for ask in method.clients.asked if ask.round == 1]
    assert all(same(ends[0], dict(ask.arrays["model"])) for ask in asked)
    assert same(ends[0], dict(before[1]))


def test_a_void_round_leaves_everything_as_it_was():
    once = make(rounds=1)
    twice = make(rounds=2, clients=Void(skewed(3, SPEC.shape, 3, each=16)))
    run(once)
    run(twice)
    for name in ("student", "generator", "averaged"):
        assert same(state_of(once.parts()[name]), state_of(twice.parts()[name]))


def test_clients_that_count_nothing_are_averaged_and_teach_nothing():
    parts = skewed(3, SPEC.shape, 3, each=16)
    silent, plain = make(clients=Countless(parts)), make(iterations=0)
    run(silent)
    run(plain)
    assert same(state_of(silent.student), state_of(plain.student))


# Who teaches what


def test_a_client_without_a_class_says_nothing_about_it():
    method = make()
    shares = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]])
    networks = [network(1), network(2), network(3)]
    batch = Batch(latent=drawn().latent, labels=torch.zeros(8, dtype=torch.int64))
    seen = []
    for other in networks[1:]:
        ensemble = ensemble_of(networks[0], other, shares=shares)
        generator = copy.deepcopy(method.generator)
        loss = method.generation(generator, batch, ensemble=ensemble, members=range(2))
        target = method.lesson(batch, ensemble).extra["target"]
        seen.append((loss.total, gradients(loss.total, generator), target))
    assert torch.equal(seen[0][0], seen[1][0])
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], seen[1][1], strict=True))
    assert torch.equal(seen[0][2], seen[1][2])
    # And one that has the class does.
    batch.labels.fill_(2)
    ensembles = [ensemble_of(networks[0], other, shares=shares) for other in networks[1:]]
    first, second = (method.lesson(batch, one).extra["target"] for one in ensembles)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("kind", ["kl", "l1_logits"])
def test_a_network_that_agrees_with_its_only_client_leaves_no_hard_samples(kind):
    student = network()
    method = make(student, discrepancy=kind, fidelity_weight=0.0, diversity_weight=0.0)
    ensemble = ensemble_of(copy.deepcopy(student))
    loss = method.generation(method.generator, drawn(), ensemble=ensemble, members=range(1))
    assert abs(loss.total.item()) < 1e-6
    found = gradients(loss.total, method.generator)
    # The divergence of two softmaxes, taken apart and together again, is 0 up to rounding.
    assert all(grad.abs().max() < 1e-5 for grad in found)


@pytest.mark.parametrize(("norm", "bn", "still"), [
    ("group", "train", True), ("batch", "frozen", True), ("batch", "train", False),
])  # fmt: skip
def test_what_a_network_knows_already_moves_it_only_where_its_batchnorm_sees_the_fakes(
    norm, bn, still
):
    student = network(norm=norm)
    method = make(student, student_bn=bn)
    student.train()
    if bn == "frozen":
        freeze_statistics(student)
    lesson = method.lesson(drawn(), ensemble_of(copy.deepcopy(student)))
    found = gradients(method.imitation(student, lesson).total, student)
    largest = max(grad.abs().max().item() for grad in found)
    assert (largest < 1e-6) == still
    assert largest < 1e-6 or largest > 1e-3


@pytest.mark.parametrize("counts", [[[9, 0, 1], [1, 5, 1]], [[1, 1, 1], [1, 1, 1]]])
def test_clients_of_one_mind_are_one_teacher_whatever_they_have(counts):
    method, one = make(), network(4)
    ensemble = method.ensemble(updates_of(one, one, counts=counts), torch.device("cpu"))
    lesson = method.lesson(drawn(), ensemble)
    expected = one.eval()(lesson.inputs).softmax(1)
    torch.testing.assert_close(lesson.extra["target"], expected, atol=1e-6, rtol=0)


def test_shares_come_from_the_counts_that_came_with_the_networks():
    method = make()
    updates = updates_of(network(1), network(2), counts=[[3, 0, 0], [1, 2, 0]])
    shares = method.ensemble(updates, torch.device("cpu")).shares
    assert shares.tolist() == [[0.75, 0.0, 0.0], [0.25, 1.0, 0.0]]
    method = make(ensemble_weights="uniform")
    assert method.ensemble(updates, torch.device("cpu")).shares.tolist() == [[0.5] * 3] * 2


# The generator's loss


def test_the_loss_of_the_generator_is_a_slow_sum_over_clients():
    method = make(discrepancy_weight=0.7, fidelity_weight=1.3, diversity_weight=0.4)
    networks, shares = [network(1), network(2)], torch.tensor([[0.8, 0.1, 0.5], [0.2, 0.9, 0.5]])
    ensemble = ensemble_of(*networks, shares=shares)
    batch = drawn()
    loss = method.generation(method.generator, batch, ensemble=ensemble, members=range(2))
    student = copy.deepcopy(method.student).eval()
    student.requires_grad_(False)
    inputs, hard, clear = loss.inputs.detach(), 0.0, 0.0
    for k, one in enumerate(networks):
        for x, y in zip(inputs, batch.labels, strict=True):
            mine = student(x[None]).softmax(1)[0]
            its = one.eval()(x[None]).softmax(1)[0].detach()
            hard += float(shares[k, y] * (mine * (mine / its).log()).sum()) / 8
            clear += float(-shares[k, y] * its[y].log()) / 8
    flat, same_class = inputs.flatten(1), 0.0
    for i in range(8):
        for j in range(8):
            of_inputs = (flat[i] - flat[j]).abs().mean()
            of_noise = (batch.latent[i] - batch.latent[j]).square().mean()
            same_class += float(of_inputs * of_noise) / 64
    terms = {name: term.item() for name, term in loss.terms.items()}
    assert terms["discrepancy"] == pytest.approx(-hard, abs=1e-5)
    assert terms["fidelity"] == pytest.approx(clear, abs=1e-5)
    assert terms["diversity"] == pytest.approx(torch.tensor(-same_class).exp().item(), abs=1e-5)
    expected = -0.7 * hard + 1.3 * clear + 0.4 * terms["diversity"]
    assert loss.total.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("per_sample", [True, False])
def test_one_step_per_client_takes_the_joint_loss_apart(per_sample):
    method = make(class_weights_per_sample=per_sample)
    shares = torch.tensor([[0.8, 0.1, 0.5], [0.2, 0.9, 0.5]])
    ensemble = ensemble_of(network(1), network(2), shares=shares)

    def loss(members: range) -> Any:
        generator = copy.deepcopy(method.generator)
        found = method.generation(generator, drawn(), ensemble=ensemble, members=members)
        return found.total, gradients(found.total, generator)

    whole, parts = loss(range(2)), [loss(range(k, k + 1)) for k in range(2)]
    torch.testing.assert_close(whole[0], parts[0][0] + parts[1][0])
    for joint, first, second in zip(whole[1], parts[0][1], parts[1][1], strict=True):
        torch.testing.assert_close(joint, first + second, atol=1e-5, rtol=1e-4)


def test_weights_by_batch_also_ask_a_client_for_what_it_never_saw():
    shares = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = {}
    for per_sample in (True, False):
        method = make(class_weights_per_sample=per_sample)
        for seed in (2, 3):
            ensemble = ensemble_of(network(1), network(seed), shares=shares)
            # Two rows of class 2, of which the second network alone knows; then change it.
            batch = Batch(latent=drawn().latent, labels=torch.tensor([0, 1] * 3 + [2, 2]))
            loss = method.generation(
                method.generator, batch, ensemble=ensemble, members=range(1, 2)
            )
            rows = F.cross_entropy(
                ensemble.networks(loss.inputs)[1], batch.labels, reduction="none"
            )
            found[per_sample] = loss.terms["fidelity"].item()
            expected = rows[6:].sum() / 8 if per_sample else rows.mean() * 2 / 8
            assert found[per_sample] == pytest.approx(expected.item(), abs=1e-5)


def test_the_clients_logits_are_constant_in_the_difference_of_logits_alone():
    student = network()
    found = {}
    for kind in ("kl", "l1_logits"):
        method = make(student, discrepancy=kind, fidelity_weight=0.0, diversity_weight=0.0)
        ensemble = ensemble_of(network(1))
        loss = method.generation(method.generator, drawn(), ensemble=ensemble, members=range(1))
        clients = ensemble.networks(loss.inputs).detach()[0]
        answer = copy.deepcopy(student).eval()(loss.inputs)
        if kind == "kl":
            p = answer.softmax(1)
            alone = -(p * (p.log() - clients.log_softmax(1))).sum(1).mean()
        else:
            alone = -(answer - clients).abs().mean()
        torch.testing.assert_close(alone, loss.total, atol=1e-5, rtol=1e-5)
        real, constant = (gradients(one, method.generator)[0] for one in (loss.total, alone))
        found[kind] = torch.allclose(real, constant, atol=1e-6)
    assert found == {"kl": False, "l1_logits": True}


# The global network's loss


def test_targets_that_are_kept_are_those_that_would_be_computed_anew():
    method = make()
    ensemble = ensemble_of(network(1), network(2), network(3))
    first, second = (method.lesson(drawn(), ensemble) for _ in range(2))
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.extra["target"], second.extra["target"])
    assert not first.extra["target"].requires_grad
    assert not first.inputs.requires_grad


def test_a_mean_over_classes_is_the_same_loss_divided_by_their_number():
    found = []
    for reduction in ("batchmean", "mean"):
        method = make(student_reduction=reduction)
        lesson = method.lesson(drawn(), ensemble_of(network(1), network(2)))
        found.append(method.imitation(method.student, lesson).total)
    torch.testing.assert_close(found[0], found[1] * 3)


@pytest.mark.parametrize("bn", ["frozen", "train"])
def test_only_an_option_lets_statistics_of_fakes_into_the_global_network(bn):
    method = make(student_bn=bn, rounds=1)
    run(method)
    tuned, averaged = state_of(method.student), state_of(method.averaged)
    kept = [name for name in tuned if "running" in name or "tracked" in name]
    assert len(kept) == 6
    assert all(torch.equal(tuned[name], averaged[name]) for name in kept) == (bn == "frozen")
    # Scale and shift of BatchNorm train either way.
    assert not torch.equal(tuned["body.1.weight"], averaged["body.1.weight"])


# What moves and what does not


@pytest.mark.parametrize("update", ["joint", "sequential"])
def test_each_step_moves_its_own_network_alone(update):
    method = make(generator_update=update, rounds=1, generator_steps=2)
    nets = {"source": method.generator, "student": method.student}
    seen: dict[str, Any] = {}
    made = method.ensemble

    def watched(*args: Any) -> ClientEnsemble:
        seen["ensemble"] = made(*args)
        seen["first"] = {n: v.clone() for n, v in seen["ensemble"].networks.state.items()}
        return seen["ensemble"]  # type: ignore[no-any-return]

    method.ensemble = watched
    roles, before = [], {name: state_of(net) for name, net in nets.items()}
    for step in method.run(context()):
        after = {name: state_of(net) for name, net in nets.items()}
        other = "student" if step.role == "source" else "source"
        if step.loss is not None and "cross_entropy" not in step.loss.terms:
            roles.append(step.role)
            assert not same(before[step.role], after[step.role])
            assert same(before[other], after[other])
        before = after
    turns = 2 if update == "joint" else 2 * 3
    assert roles == (["source"] * turns + ["student"] * 2) * 2
    assert same(seen["first"], seen["ensemble"].networks.state)
    assert all(weight.grad is None for weight in seen["ensemble"].networks.form.parameters())
    assert all(weight.grad is None for net in nets.values() for weight in net.parameters())


def test_the_generator_stays_over_the_rounds_and_the_optimizers_do_not():
    rates: list[tuple[str, float, int]] = []
    method = make(server_lr_decay=0.5, rounds=2)
    ends: list[dict[str, Tensor]] = []
    starts: list[dict[str, Tensor]] = []
    ctx = context(lambda: ends.append(state_of(method.generator)) or True)  # type: ignore[func-returns-value]
    ask = ctx.optimizer

    def watched(name: str, *args: Any, **named: Any) -> torch.optim.Optimizer:
        starts.append(state_of(method.generator))
        found = ask(name, *args, **named)
        rates.append((name, found.param_groups[0]["lr"], len(found.state)))
        return found

    ctx.optimizer = watched  # type: ignore[method-assign]
    list(method.run(ctx))
    lr, generator_lr = method.cfg.student_lr, method.cfg.generator_lr
    expected = [("student", lr, 0), ("generator", generator_lr, 0)]
    assert rates == expected + [(name, rate / 2, 0) for name, rate, _ in expected]
    assert same(ends[0], starts[2])
    assert not same(ends[0], starts[0])


def test_nothing_but_weights_and_counts_leaves_a_client():
    clients = DirectClients(skewed(3, SPEC.shape, 3, each=16))
    method = make(clients=clients, base="scaffold")
    updates: list[ClientUpdate] = []
    ask = clients.ask
    clients.ask = lambda *a, **n: [updates.append(u) or u for u in ask(*a, **n)]  # type: ignore
    run(method)
    for update in updates:
        assert update.arrays.keys() == {"model", "control-change"}
        assert torch.equal(update.counts, clients.parts[update.partition].counts())
        assert update.examples == 16
    # And nothing but weights reaches it: the generator stays at the server.
    for sent in clients.asked:
        assert sent.arrays.keys() == {"model", "control"}
        assert sent.arrays["model"].keys() == method.student.state_dict().keys()


@pytest.mark.parametrize("policy", ["local", "frozen"])
def test_clients_that_keep_their_statistics_teach_with_those_of_the_global_network(policy):
    method = make(bn_policy=policy, rounds=1)
    seen: list[ClientEnsemble] = []
    made = method.ensemble
    method.ensemble = lambda *args: seen.append(made(*args)) or seen[-1]
    before = state_of(method.student)
    run(method)
    name = "body.1.running_mean"
    assert torch.equal(method.averaged.state_dict()[name], before[name])
    assert torch.equal(seen[0].networks.state[name], before[name].expand(3, -1))


@pytest.mark.parametrize("update", ["joint", "sequential"])
def test_passes_are_what_hooks_count(update):
    method = make(generator_update=update, rounds=1, generator_steps=2)
    counts = {"generator": 0, "student": 0}
    for name in counts:
        method.parts()[name].register_forward_hook(
            lambda *_, name=name: counts.__setitem__(name, counts[name] + 1)
        )
    steps = run(method)
    passes = method.passes(method.cfg)
    assert counts == {name: passes[f"{name}_forward"] for name in counts}
    roles = [step.role for step in steps]
    assert roles.count("source") == passes["generator_step"]
    # One of them is the clients'.
    assert roles.count("student") == passes["student_step"]


# In a run


def train(
    out: Path,
    clients: DirectClients,
    *,
    steps: int | None = None,
    resume: bool = False,
    **more: Any,
) -> Any:
    """With a trainer, which stops after the round in which `steps` were done."""
    student = network()
    cfg = FedFTGConfig(**{**SMALL, "rounds": 3, **more})
    method: Any = build_method("fedftg", cfg, TASK, [], student, {"clients": clients}, 0)
    clients.client = method.client
    config = TrainerConfig(device="cpu", max_steps=steps)
    trainer = Trainer(
        method, TASK, student=student, sources={"clients": clients}, out=out, config=config
    )
    trainer.run(resume=resume)
    return method


@pytest.mark.parametrize("base", ["fedavg", "scaffold"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(base, tmp_path):
    first, second = (DirectClients(skewed(3, SPEC.shape, 3, each=16)) for _ in range(2))
    whole = train(tmp_path / "whole", first, base=base)
    cut = train(tmp_path / "parts", second, steps=1, base=base)
    resumed = train(tmp_path / "parts", second, resume=True, base=base)
    for name in ("student", "generator", "averaged"):
        states = [state_of(one.parts()[name]) for one in (whole, cut, resumed)]
        assert same(states[0], states[2])
        assert not same(states[0], states[1])


def test_what_is_on_has_a_name():
    assert make().variant() == ""
    assert make(base="feddyn", discrepancy_weight=0.0).variant() == "feddyn, without hard samples"
    uniform = make(label_sampling="uniform", ensemble_weights="uniform")
    assert uniform.variant() == "uniform labels, uniform weights"


def test_images_of_a_bounded_generator_are_normalised():
    spec = InputSpec.image(1, 8, 8, mean=[0.2], std=[0.5])
    cfg = FedFTGConfig(**SMALL, generator_head="sigmoid")
    clients = DirectClients(skewed(3, SPEC.shape, 3, each=16))
    method = FedFTG(cfg, Classification(spec, 3), [], network(), {"clients": clients})
    made = method.as_inputs(method.generator(drawn().latent, drawn().labels))
    assert made.min() >= -0.4
    assert made.max() <= 1.6


def test_inputs_that_the_generator_cannot_make_are_refused():
    clients = DirectClients(skewed(3, (4,), 3, each=16))
    task = Classification(InputSpec("table", (4,)), 3)
    with pytest.raises(ShapeError, match="expected \\(channels"):
        FedFTG(FedFTGConfig(**SMALL), task, [], nn.Linear(4, 3), {"clients": clients})
