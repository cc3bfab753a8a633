"""Clients of a recipe: who holds what, and a server that is killed and started again."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vestige.core.types import InputSpec
from vestige.errors import DataError, RecipeError
from vestige.federated.partition import PartitionConfig
from vestige.federated.states import ClientStates
from vestige.recipes.federation import Judging, SimulatedClients, brief, deal
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import run_recipe
from vestige.recipes.schema import Recipe

SPEC = InputSpec.image(1, 16, 16)
RUNS = {
    "scaffold": ("fedavg", {"base": "scaffold"}),
    "tuned": ("fedavg", {"tune_epochs": 20, "client_lr": 0.1}),
    "fedd2s": ("fedd2s", {"drop_every": 1, "warmup_epochs": 1}),
    "fedgen": ("fedgen", {"lean": True, "generator_steps": 2}),
}


class Killed(BaseException):
    """Not an Exception, so that nothing on the way may swallow it."""


def recipe_of(arm: str, **trainer: Any) -> Recipe:
    method, config = RUNS[arm]
    name = "block-cnn" if method == "fedd2s" else "convnet"
    partition = {"name": "dirichlet-by-class", "clients": 4, "alpha": 0.3}
    return Recipe.model_validate(
        {
            "method": method,
            "data": "digits",
            "input": {"channels": 1, "height": 16, "width": 16, "mean": [0.31], "std": [0.32]},
            "num_classes": 10,
            "teacher": None,
            "student": {"name": name, "args": {"widths": [8, 8, 8]}},
            "sources": {"clients": {"kind": "clients", "data": "digits", "partition": partition}},
            "federation": {"engine": "in-process"},
            "trainer": {"device": "cpu", "threads": 1, **trainer},
            "config": {"rounds": 4, "local_steps": 2, "active": 3, **config},
        }
    )


def states_in(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What each client keeps, by file."""
    files = sorted((out / "clients").rglob("*.safetensors"))
    return {str(path.relative_to(out)): load_file(path) for path in files}


def facts_in(out: Path) -> dict:
    """federated.json without what depends on the moment."""
    facts = json.loads((out / "federated.json").read_text())
    return {
        **facts,
        "rounds": [{k: v for k, v in one.items() if k != "seconds"} for one in facts["rounds"]],
    }


def scores_in(out: Path) -> list[dict]:
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows
    ]


@pytest.mark.parametrize(
    ("arm", "after"), [("scaffold", 0), ("scaffold", 2), ("fedd2s", 2), ("fedgen", 1)]
)
def test_a_server_that_is_killed_within_a_round_goes_on_as_if_it_never_was(
    arm, after, tmp_path, monkeypatch
):
    """Killed in round 3, when `after` of its clients have written what they keep."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_recipe(recipe_of(arm), whole, report=False)
    written: list[int] = []
    save = ClientStates.save

    def dying(self, partition, at, state):
        if at[0] == 2 and len(written) == after:
            raise Killed
        written.extend([partition] if at[0] == 2 else [])
        save(self, partition, at, state)

    with monkeypatch.context() as patch:
        patch.setattr(ClientStates, "save", dying)
        with pytest.raises(Killed):
            run_recipe(recipe_of(arm), killed, report=False)
    assert len(written) == after
    assert not (killed / "federated.json").exists()
    left = [name for name in states_in(killed) if "/00000002-" in name]
    assert len(left) == after

    run_recipe(recipe_of(arm), killed, resume=True, report=False)
    # Of what is personal only a checkpoint has the server's part.
    first, second = (
        load_file(max((out / "checkpoints").glob("*.safetensors"))) for out in (whole, killed)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    kept, again = states_in(whole), states_in(killed)
    assert kept.keys() == again.keys()
    assert len(kept) > 4
    for file, arrays in kept.items():
        assert all(torch.equal(value, again[file][name]) for name, value in arrays.items()), file
    assert facts_in(whole) == facts_in(killed)
    assert scores_in(whole) == scores_in(killed)


def test_a_run_without_a_checkpoint_begins_anew_beside_what_clients_kept(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_recipe(recipe_of("scaffold", checkpoint_every=4), whole, report=False)
    save = ClientStates.save

    def dying(self, partition, at, state):
        save(self, partition, at, state)
        if at[0] == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ClientStates, "save", dying)
        with pytest.raises(Killed):
            run_recipe(recipe_of("scaffold", checkpoint_every=4), killed, report=False)
    run_recipe(recipe_of("scaffold", checkpoint_every=4), killed, resume=True, report=False)
    first, second = (load_file(out / "student.safetensors") for out in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert facts_in(whole) == facts_in(killed)


def test_clients_that_tune_for_themselves_are_judged_by_what_came_of_it(tmp_path):
    """The last evaluation comes after the tuning, and finds the tuned networks."""
    run_recipe(recipe_of("tuned"), tmp_path / "run", report=False)
    evaluations = [row for row in scores_in(tmp_path / "run") if "scores" in row]
    # The global network is the same before and after.
    before, after = (row["scores"] for row in evaluations[-2:])
    assert before["accuracy"] == after["accuracy"]
    assert after["client_mean"] > before["client_mean"] + 0.1


def test_what_a_run_tells_of_its_clients(tmp_path):
    summary = run_recipe(recipe_of("scaffold"), tmp_path / "run", report=False)
    facts = facts_in(tmp_path / "run")
    assert facts["clients"] == 4
    counts = torch.tensor(facts["holds"]["counts"])
    assert counts.shape == (4, 10)
    assert [client["examples"] for client in facts["clients_at_end"]] == counts.sum(1).tolist()
    assert {(one["kind"], one["group"]) for one in facts["leaves"]} == {
        ("train", "model"),
        ("train", "control-change"),
    }
    assert set(facts["numbers"]) == {"cross_entropy", "accuracy", "balanced_accuracy"}
    told = summary["federated"]
    assert (told["exchanges"], told["asked"], told["answered"], told["void"]) == (4, 12, 12, 0)
    assert told == {**brief(facts_with_time(tmp_path / "run"), "accuracy")}


def facts_with_time(out: Path) -> dict:
    return json.loads((out / "federated.json").read_text())


def simulated(seed: int = 0, clients: int = 4) -> SimulatedClients:
    partition = PartitionConfig(name="dirichlet-by-class", clients=clients, alpha=0.3)
    return SimulatedClients("digits", SPEC, 10, partition, "same-mix", None, seed)


def test_each_example_is_dealt_to_one_client_and_alike_wherever_it_is_dealt():
    dealt = deal(simulated())
    rows = torch.cat(dealt.rows)
    assert len(rows) == len(set(rows.tolist())) <= len(dealt.train[1])
    deal.cache_clear()
    again = deal(pickle.loads(pickle.dumps(simulated())))
    assert all(torch.equal(one, other) for one, other in zip(dealt.rows, again.rows, strict=True))
    other = deal(simulated(seed=1))
    assert any(len(a) != len(b) for a, b in zip(dealt.rows, other.rows, strict=True))
    for number, counts in enumerate(dealt.counts):
        data = simulated()(number, 4)
        assert torch.equal(data.counts(), counts)
        # It is tested on the classes that it has.
        assert not bool((counts[data.test_labels] == 0).any())


def test_another_number_of_nodes_than_the_partition_has_is_refused():
    with pytest.raises(DataError, match="got 5 nodes, expected 4"):
        simulated()(0, 5)


@pytest.mark.parametrize(
    ("count", "judges", "wanted"),
    [(4, 100, [0, 1, 2, 3]), (10, 5, [0, 2, 4, 6, 8]), (1000, 3, [0, 333, 666]), (9, 0, [])],
)
def test_judges_are_spread_evenly(count, judges, wanted):
    judging = Judging(None, SimpleNamespace(count=count), judges, None)
    assert judging._asked() == wanted


def test_more_active_clients_than_there_are_is_a_mistake(tmp_path: Path) -> None:
    recipe = load_recipe("fedavg", preset="smoke", overrides=["config.active=9"])
    with pytest.raises(RecipeError, match="active: got 9 of 8 clients"):
        run_recipe(recipe, tmp_path, report=False)


def test_more_clients_than_examples_are_told_before_anybody_is_asked(tmp_path: Path) -> None:
    many = ["sources.clients.partition.clients=500"]
    with pytest.raises(DataError, match="500 clients"):
        run_recipe(load_recipe("fedavg", preset="smoke", overrides=many), tmp_path, report=False)


def test_a_teacher_is_not_taken_by_a_method_that_needs_none() -> None:
    with pytest.raises(RecipeError, match="takes no teacher, got 1; set teacher: null"):
        load_recipe("fedavg", overrides=["teacher=builtin:digits-convnet"])
