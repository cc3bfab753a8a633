"""Saved loss curves: the first 50 steps of each method, on the CPU in float32.

A change that is meant to move them runs this file with tests/doubles in PYTHONPATH, which
writes them anew, and its commit says why they moved.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import DirectClients, skewed
from ngram import TOPICS, NGram, made_up

from vestige.core.texts import to_bytes
from vestige.core.types import Access, InputSpec
from vestige.models.factory import build_model
from vestige.recipes.build import build, build_method
from vestige.recipes.catalog import METHODS
from vestige.recipes.loading import load_recipe
from vestige.sources.audio import AudioSource
from vestige.tasks.classification import Classification
from vestige.tasks.speech import Speech
from vestige.tasks.text import Text
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.files import write_text
from vestige.training.tracking.metrics import read_metrics
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

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


def heard_curve(name, folder):
    """Of a method for speech, whose recipe would train its teachers first: on a tiny one."""
    pytest.importorskip("transformers")
    pytest.importorskip("jiwer")
    spec, said = InputSpec.audio(0.1, 8000), to_bytes(["one", "two", "two", "one"], 8)
    torch.manual_seed(0)
    teacher = build_model("whisper", spec, 8, width=8, ffn=8, mel_bins=8, max_tokens=5)
    teacher.learn_vocabulary(said)
    optimizer = torch.optim.Adam(teacher.parameters(), 3e-2)
    for _ in range(25):
        # Until it knows when to stop: what does not end is dropped.
        loss = teacher.training_loss(torch.randn(4, *spec.shape) * 0.1, said)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    student = teacher.with_layers(decoder_layers=1)
    task, audio = Speech(spec, 8), torch.randn(20, *spec.shape) * 0.1
    source = AudioSource(audio, 8000, origin="unlabelled", name="heap")
    cfg = METHODS.get(name).Config(rounds=5, iterations=10, batch_size=8, label_rounds=2)
    teachers = [WhiteBoxTeacher(teacher.eval())]
    method = build_method(name, cfg, task, teachers, student, {"audio": source}, 0)
    config = TrainerConfig(device="cpu", log_every=1)
    Trainer(method, task, teachers=teachers, student=student, out=folder, config=config).run()


def read_texts_curve(name, folder):
    """Of a method for texts: from a tiny classifier, or from what a trigram model writes."""
    pytest.importorskip("transformers")
    spec, news = InputSpec.text(128), made_up(120)
    torch.manual_seed(0)
    sizes = {"layers": 2, "width": 8, "heads": 2, "vocabulary": 120, "tokens": 12}
    teacher = build_model("bert", spec, len(TOPICS), **sizes)
    teacher.learn_vocabulary(to_bytes([text for text, _ in news], 128))
    student, shown = teacher.with_layers(layers=1), [WhiteBoxTeacher(teacher.eval())]
    method = METHODS.get(name)
    if method.requires.access == Access.LABELS:
        shown = [NGram(news)]
    fields = method.Config.model_fields
    values = {"rounds": 5, "iterations": 2, "batch_size": 8, "guess_steps": 2, "length": 8}
    values |= {"samples": 80, "round_texts": 128, "epochs": 5, "student_lr": 1e-2}
    cfg = method.Config(**{key: value for key, value in values.items() if key in fields})
    task = Text(spec, len(TOPICS))
    made = build_method(name, cfg, task, shown, student, {}, 0)
    config = TrainerConfig(device="cpu", log_every=1)
    Trainer(made, task, teachers=shown, student=student, out=folder, config=config).run()


def clients_curve(name, folder):
    """Of a method whose clients train: three of four in each round, without an engine."""
    method, parts = METHODS.get(name), skewed(4, (1, 8, 8), 3)
    values = {"rounds": 17, "active": 3, "local_steps": 2, "batch_size": 8, "iterations": 1}
    values |= {"generator_steps": 2, "student_steps": 1, "latent_dim": 8, "hidden_dim": 8}
    values |= {"generator_width": 4, "server_batch_size": 8, "drop_every": 4, "client_lr": 0.02}
    cfg = method.Config(**{k: v for k, v in values.items() if k in method.Config.model_fields})
    task, clients = Classification(InputSpec.image(1, 8, 8), 3), DirectClients(parts)
    torch.manual_seed(0)
    student = build_model("block-cnn", task.spec, 3, widths=[8, 8, 8], hidden=8)
    made = build_method(name, cfg, task, [], student, {"clients": clients}, 0)
    clients.client = made.client
    config = TrainerConfig(device="cpu", log_every=1)
    Trainer(
        made, task, student=student, sources={"clients": clients}, out=folder, config=config
    ).run()


def curve(name, folder):
    if "clients" in METHODS.get(name).requires.sources:
        clients_curve(name, folder)
        return read_curve(folder)
    if METHODS.get(name).requires.tasks == ("text",):
        read_texts_curve(name, folder)
        return read_curve(folder)
    if METHODS.get(name).requires.tasks == ("speech",):
        heard_curve(name, folder)
        return read_curve(folder)
    fields = METHODS.get(name).Config.model_fields
    sizes = {**SIZES, "iterations": ITERATIONS.get(name, 2)}
    overrides = [f"config.{key}={value}" for key, value in sizes.items() if key in fields]
    overrides += FURTHER.get(name, [])
    recipe = load_recipe(name, overrides=[*overrides, "trainer.log_every=1", "data=null"])
    build(recipe, out=folder).trainer.run()
    return read_curve(folder)


def read_curve(folder):
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

    for method in sys.argv[1:] or METHODS.names():
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps(curve(method, Path(folder)), indent=1)
        write_text(FOLDER / f"{method}.json", text + "\n")
        sys.stdout.write(f"{method}\n")
