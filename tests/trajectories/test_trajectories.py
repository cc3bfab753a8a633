"""Saved loss curves: the first 50 steps of each method, on the CPU in float32.

A change that is meant to move them runs `python tests/trajectories/test_trajectories.py`, which
writes them anew, and its commit says why they moved.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from vestige.recipes.build import build
from vestige.recipes.catalog import METHODS
from vestige.recipes.loading import load_recipe
from vestige.training.files import write_text
from vestige.training.tracking.metrics import read_metrics

FOLDER = Path(__file__).parent
# About 50 steps whatever a method's inner counts are; small enough for a second or two.
SIZES = {
    **{"rounds": 5, "batch_size": 16, "generator_width": 4, "latent_dim": 16},
    **{"warmup": 1, "inversion_steps": 5, "synthesis_batch_size": 16, "student_steps": 5},
    **{"negatives": 16, "head_dim": 8, "head_queries": 8},
}
ITERATIONS = {"dfad": 2, "kd": 10, "kd3": 10}
# Among images that the teacher is equally sure of, the last bit decides which ones are taken.
FURTHER = {"kd3": ["config.selection=off"]}


def curve(name, folder):
    fields = METHODS.get(name).Config.model_fields
    sizes = {**SIZES, "iterations": ITERATIONS.get(name, 2)}
    overrides = [f"config.{key}={value}" for key, value in sizes.items() if key in fields]
    overrides += FURTHER.get(name, [])
    recipe = load_recipe(name, overrides=[*overrides, "trainer.log_every=1", "data=null"])
    build(recipe, out=folder).trainer.run()
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "step"]
    return {"roles": [row["role"] for row in rows], "totals": [row["total"] for row in rows]}


@pytest.mark.parametrize("name", METHODS.names())
def test_loss_curve_is_the_saved_one(name, tmp_path):
    saved = json.loads((FOLDER / f"{name}.json").read_text())
    found = curve(name, tmp_path)
    assert found["roles"] == saved["roles"]
    expected, actual = np.array(saved["totals"]), np.array(found["totals"])
    residual = (actual - expected) / np.abs(expected).mean()
    # Kernels differ between processors in the last bit, and training multiplies that; a change of
    # the algorithm moves the curve by far more, or always to the same side.
    assert np.abs(residual).max() < 0.05
    assert abs(residual.mean()) < 0.005


def test_the_comparison_sees_a_changed_weight(tmp_path):
    recipe = load_recipe(
        "kd", overrides=["config.rounds=5", "config.iterations=10", "config.batch_size=16"]
    )
    changed = recipe.model_copy(update={"config": {**recipe.config, "student_lr": 4.4e-3}})
    changed = changed.model_copy(
        update={"data": None, "trainer": recipe.trainer.model_copy(update={"log_every": 1})}
    )
    build(changed, out=tmp_path).trainer.run()
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["kind"] == "step"]
    expected = np.array(json.loads((FOLDER / "kd.json").read_text())["totals"])
    actual = np.array([row["total"] for row in rows])
    residual = (actual - expected) / np.abs(expected).mean()
    assert np.abs(residual).max() >= 0.05 or abs(residual.mean()) >= 0.005


if __name__ == "__main__":
    import tempfile

    for method in METHODS.names():
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps(curve(method, Path(folder)), indent=1)
        write_text(FOLDER / f"{method}.json", text + "\n")
        sys.stdout.write(f"{method}\n")
