"""From a folder of recordings to a student with its page, on a set of tones made here."""

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from vestige.core.types import InputSpec
from vestige.data.audio import load_audio
from vestige.errors import DataError, RecipeError
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import run_recipe
from vestige.recipes.teacher import train_teacher
from vestige.recipes.teacher_schema import load_teacher_recipe
from vestige.teachers.loading import open_teacher

pytest.importorskip("transformers")
pytest.importorskip("jiwer")
WORDS = ("low", "middle", "high")
RATE = 4000


def record(folder: Path, each: int, seed: int) -> None:
    """`each` recordings of every word, at a rate that the teacher does not have."""
    folder.mkdir(parents=True)
    rng, lines = np.random.RandomState(seed), []
    for number, word in enumerate(WORDS * each):
        time = np.arange(RATE // 4) / RATE
        pitch = 200 * 3 ** (number % 3) * rng.uniform(0.95, 1.05)
        samples = 0.5 * np.sin(2 * np.pi * pitch * time) + 0.02 * rng.standard_normal(len(time))
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
        lines.append({"file_name": f"{number}.wav", "text": word, "speaker": "ab"[number % 2]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    record(folder / "train", 16, 0)
    record(folder / "test", 4, 1)
    (folder / "test" / "broken.wav").write_bytes(b"RIFF")
    return folder


@pytest.fixture(scope="module")
def teacher(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = {
        "name": "tones",
        "task": "speech",
        "data": f"{tones}[join=1-1x4]",
        "input": {"kind": "audio", "shape": [4000], "sample_rate_hz": 8000},
        "num_classes": 8,
        "model": {
            "name": "whisper",
            "args": {
                "width": 32,
                "mel_bins": 16,
                "max_tokens": 6,
                "hop_samples": 200,
                "n_fft": 512,
            },
        },
        "training": {"epochs": 20, "batch_size": 16, "lr": 0.003},
        "threads": 1,
    }
    out = tmp_path_factory.mktemp("teacher")
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _, card = train_teacher(load_teacher_recipe(out / "recipe.yaml"), out)
    assert (card.metric, card.classes) == ("wer", ())
    assert card.score is not None and card.score < 0.3
    return out / "tones.json"


def recipe_of(teacher: Path, tones: Path, folder: Path, **changes: Any) -> Path:
    part = {"data": str(tones)}
    raw = {
        "method": "udistil-whisper",
        "defaults": "published",
        "task": "speech",
        "data": str(tones),
        "teacher": str(teacher),
        "student": {"name": "layers-of-teacher", "args": {"encoder_layers": 1}},
        "trainer": {"threads": 1, "device": "cpu"},
        "sources": {
            "audio": {
                "kind": "heap",
                "origin": "unlabelled",
                "parts": {
                    "clean": {**part, "wanted": True},
                    "spoilt": {**part, "shift": ["noise|reversed|babble"], "wanted": False},
                },
            }
        },
        "config": {
            "rounds": 2, "iterations": 4, "batch_size": 8, "label_rounds": 2, "keep_fraction": 0.5,
            "student_lr": 1e-3,
        },
        **changes,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_run_leaves_a_student_that_teaches_and_a_page_to_hear(teacher, tones, tmp_path, caplog):
    recipe = load_recipe(recipe_of(teacher, tones, tmp_path))
    out = tmp_path / "run"
    summary = run_recipe(recipe, out)
    assert summary["metric"] == "wer"
    assert 0 <= summary["teacher"]["score"] < 0.5
    stage = summary["filtered"]["audio"]
    assert sum(stage["counts"].values()) == stage["known"]
    assert stage["filters"]["confidence"]["area_under_curve"] > 0.5
    items = [json.loads(line) for line in (out / "provenance.jsonl").read_text().splitlines()]
    assert len(items) == stage["known"]
    assert {item["part"] for item in items} == {"clean", "spoilt"}
    origins = {one["name"]: one["origin"] for one in summary["real_data"]}
    assert set(origins.values()) == {"unlabelled", "real"}
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["student"]["wer"] == pytest.approx(summary["student"]["score"])
    assert evaluation["classes"] == []
    page = (out / "report.html").read_text()
    assert "On real test recordings" in page
    assert "<audio controls" in page
    assert "1 files are corrupt" in caplog.text
    student = open_teacher(str(out / "student.json"))
    assert student.task == "speech"
    waveforms, _ = load_audio(str(tones), "test").examples(InputSpec.audio(0.5, 8000))
    assert set(" ".join(student.module.transcribe(waveforms).texts).split()) <= set(WORDS)


def test_labels_are_read_by_the_arm_that_asks_for_them_and_told_as_real(teacher, tones, tmp_path):
    path = recipe_of(teacher, tones, tmp_path)
    raw = yaml.safe_load(path.read_text())
    audio = raw["sources"]["audio"]
    raw["sources"]["transcripts"] = {**audio, "origin": "real", "column": "text"}
    raw["config"]["filter"] = "labels"
    path.write_text(yaml.safe_dump(raw))
    summary = run_recipe(load_recipe(path), tmp_path / "run", report=False)
    read = [one for one in summary["real_data"] if one["purpose"] == "distillation"]
    assert sorted(one["origin"] for one in read) == ["real", "real", "unlabelled", "unlabelled"]
    stage = summary["filtered"]["audio"]
    assert stage["filters"]["labels"]["area_under_curve"] == 1


def test_all_dropped_is_told_before_training(teacher, tones, tmp_path):
    config = {"rounds": 1, "iterations": 1, "filter": "confidence", "threshold": 2.0}
    recipe = load_recipe(recipe_of(teacher, tones, tmp_path, config=config))
    with pytest.raises(DataError, match=r"all of \d+ were dropped .*confidence"):
        run_recipe(recipe, tmp_path / "run", report=False)


def test_a_student_of_another_kind_is_refused(teacher, tones, tmp_path):
    student = {"name": "whisper", "args": {"width": 8, "max_tokens": 6}}
    path = recipe_of(teacher, tones, tmp_path, student=student)
    run_recipe(load_recipe(path), tmp_path / "fresh", report=False)
    student = {"name": "convnet", "args": {"widths": [4, 4, 4]}}
    path = recipe_of(teacher, tones, tmp_path, student=student)
    with pytest.raises((RecipeError, ValueError)):
        run_recipe(load_recipe(path), tmp_path / "other", report=False)


def test_the_same_seed_gives_the_same_student(teacher, tones, tmp_path):
    recipe = load_recipe(recipe_of(teacher, tones, tmp_path))
    weights = []
    for name in ("one", "two"):
        run_recipe(recipe, tmp_path / name, report=False)
        weights.append((tmp_path / name / "student.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert torch.get_num_threads() >= 1
