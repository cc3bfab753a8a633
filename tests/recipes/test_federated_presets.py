"""Every preset of every shipped recipe whose clients train runs one round at the smallest size."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="needs Flower: pip install 'vestige[federated]'")

from vestige.data.image import BUILT_IN, load_images
from vestige.errors import DataError
from vestige.federated.partition import PartitionConfig
from vestige.recipes import catalog
from vestige.recipes.build import Job
from vestige.recipes.files import read_yaml
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import run_recipe
from vestige.recipes.schema import Recipe

PRESETS = [
    (name, preset)
    for name in catalog.shipped()
    if read_yaml(name).get("teacher") is None
    for preset in (read_yaml(name).get("presets") or {"": {}})
]
# Networks and everything else stay as shipped.
TINY = {
    "rounds": 1,
    "active": 2,
    "local_steps": 1,
    "batch_size": 4,
    "generator_steps": 1,
    "iterations": 1,
    "student_steps": 1,
    "server_batch_size": 2,
    "generator_batch_size": 4,
    "tune_epochs": 1,
}
FEW = 200
DEEP = [("fedftg", "gpu"), ("fedftg", "paper")]


@functools.cache
def few_images(name: str, split: str) -> Any:
    found = load_images(name, split)
    return replace(found, images=found.images[:FEW], labels=found.labels[:FEW])


def tiny(run: Recipe) -> Recipe:
    """One round of two of four clients, in this process."""
    known = run.method_config().model_dump()
    config = {key: value for key, value in TINY.items() if known.get(key)}
    clients = run.sources["clients"]
    partition = PartitionConfig(name="even", clients=4)
    return run.model_copy(
        update={
            "config": {**run.config, **config, "active": 2},
            "sources": {"clients": clients.model_copy(update={"partition": partition})},
            "federation": run.federation.model_copy(
                update={"engine": "in-process", "client_gpus": 0.0}
            ),
            "trainer": run.trainer.model_copy(update={"device": "cpu"}),
        }
    )


def test_there_are_such_recipes():
    assert {"fedavg", "fedgen", "fedftg", "fedd2s"} <= {name for name, _ in PRESETS}


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        # Two ResNet-18 and a wide generator: a minute on two cores.
        pytest.param(*case, marks=pytest.mark.slow if case in DEEP else ())
        for case in PRESETS
    ],
)
def test_every_preset_runs_one_round(
    name: str, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = load_recipe(name, preset=preset or None)
    try:
        catalog.DATA.get("image").find(str(recipe.data), "test")
    except DataError as error:
        pytest.skip(str(error))
    if recipe.data != BUILT_IN:
        monkeypatch.setattr("vestige.data.image.load_images", few_images)
    for arm in recipe.arms or [None]:
        run = tiny(recipe if arm is None else recipe.arm(arm))
        before: dict[str, torch.Tensor] = {}

        def keep(job: Job, before: dict[str, torch.Tensor] = before) -> None:
            assert job.student is not None
            before |= {key: value.clone() for key, value in job.student.state_dict().items()}

        out = tmp_path / (arm or "main")
        summary = run_recipe(run, out, report=False, built=keep)
        assert summary["complete"] and summary["teacher"] is None
        told = json.loads((out / "federated.json").read_text())
        assert told["clients"] == 4 and not any(one["rejected"] for one in told["rounds"])
        assert told["rounds"] and (out / "clients.png").is_file()
        assert summary["federated"]["void"] == 0
        kind = summary["result"]["kind"]
        assert (out / "student.safetensors").is_file() == (kind == "global model")
        assert len(told["clients_at_end"]) == 4
        assert 0 <= summary["student"]["score"] <= 1
