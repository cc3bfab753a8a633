"""Pools from the command line: made, shown, drawn from by another run, and mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vestige
from vestige.sources.pool import Pool

CPU = ["--set", "trainer.device=cpu"]


@pytest.fixture
def images(program) -> Path:
    code, out, err = program(
        *("run", "cmi", "--preset", "smoke", *CPU, "--seed", "3", "--out", "images"),
        *("--set", "config.warmup=3", "--set", "config.rounds=0"),
    )
    assert code == 0, err
    assert "images: samples.png, report.html, summary.json, pool" in out
    return Path("images")


def test_a_run_may_stop_with_its_pool(images):
    summary = json.loads((images / "summary.json").read_text())
    assert summary["student"] is None
    assert summary["result"] == {"kind": "pool", "path": "pool"}
    assert summary["images_made"] == summary["pool"]["images"] == 48
    assert summary["pool"]["diversity"]["inputs"] == 48
    assert summary["diagnosis"] == []
    assert not (images / "student.safetensors").exists()
    card = json.loads((images / "pool" / "pool.json").read_text())
    assert card["method"] == "cmi"
    assert card["seed"] == 3
    assert card["batches"] == len(card["losses"]) == 3
    assert card["real_data"] == []
    run = json.loads((images / "run.json").read_text())
    assert card["teacher_fingerprint"] == run["teacher_fingerprint"]
    assert np.load(images / "pool" / "images.npy").shape == (48, 1, 16, 16)
    assert (images / "pool" / "samples.png").read_bytes() == (images / "samples.png").read_bytes()
    page = (images / "report.html").read_text()
    assert "A pool of 48 images was synthesised from the teacher; no real image was read" in page
    assert "with a near repeat" in page
    assert "What was synthesised" in page
    assert "to make this pool" in page
    assert "the student" not in page.split("</style>")[-1].split("To run it again")[0].lower()


def test_a_pool_is_shown_with_a_picture_and_another_judge(program, images):
    code, out, err = program(
        "pool",
        "show",
        str(images),
        "--picture",
        "sheet.png",
        "--features",
        "builtin:digits-convnet",
    )
    assert code == 0, err
    assert "48 of 1 x 16 x 16 in 3 batches" in out
    assert "to builtin:digits-convnet" in out
    assert Path("sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("folder", ["images", "images/pool"])
def test_another_run_learns_from_a_pool(program, images, folder):
    code, _, err = program(
        *("run", "kd", "--preset", "smoke", *CPU, "--out", "taught"),
        *("--set", "sources.inputs.kind=pool", "--set", f"sources.inputs.data={folder}"),
    )
    assert code == 0, err
    summary = json.loads(Path("taught/summary.json").read_text())
    assert summary["diagnosis"] == [] or all(
        finding["code"] != "pool-of-another-teacher" for finding in summary["diagnosis"]
    )
    assert [item["purpose"] for item in summary["real_data"]] == ["evaluation"]
    # This run only read what another had made.
    assert summary["images_made"] == 0


def test_images_are_added_to_an_earlier_pool(program, images):
    code, _, err = program(
        *("run", "fast", "--preset", "smoke", *CPU, "--out", "more"),
        *("--set", "sources.pool.kind=pool", "--set", f"sources.pool.data={images}"),
        *("--set", "config.warmup=0", "--set", "config.batches_per_round=0"),
    )
    assert code == 0, err
    summary = json.loads(Path("more/summary.json").read_text())
    # It made none of its own: all that the student saw is the earlier pool.
    assert summary["images_made"] == 0
    assert not Path("more/pool").exists()


def test_a_pool_of_another_teacher_is_told_with_both_fingerprints(program, images):
    card = json.loads((images / "pool" / "pool.json").read_text())
    (images / "pool" / "pool.json").write_text(
        json.dumps({**card, "teacher_fingerprint": "0123456789abcdef0123"})
    )
    code, out, err = program(
        *("run", "kd", "--preset", "smoke", *CPU, "--out", "taught"),
        *("--set", "sources.inputs.kind=pool", "--set", "sources.inputs.data=images"),
    )
    assert code == 0, err
    summary = json.loads(Path("taught/summary.json").read_text())
    (finding,) = (f for f in summary["diagnosis"] if f["code"] == "pool-of-another-teacher")
    assert "0123456789abcdef" in finding["message"]
    assert card["teacher_fingerprint"][:16] in finding["message"]
    assert "pool-of-another-teacher" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pool", "show", "nowhere"], "expected a pool: a folder with pool.json"),
        (["run", "kd", "--set", "sources.inputs.kind=pool"], "a pool needs its folder"),
        (
            ["validate", "kd", *("--set", "sources.inputs.kind=pool"),
             *("--set", "sources.inputs.data=nowhere")],
            "expected a pool: a folder with pool.json",
        ),
        (["run", "cmi", "--set", "config.rounds=0"], ""),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_runs(program, arguments, told):
    if not told:
        arguments, told = [*arguments, "--set", "config.warmup=0"], "rounds 0 and warmup 0"
    code, out, err = program(*arguments)
    assert code == 2
    assert told in out + err


def test_distill_hands_the_pool_back_to_draw_from_and_to_hand_on():
    teacher = vestige.load_teacher("builtin:digits-convnet")
    spec = vestige.InputSpec.image(1, 16, 16, mean=(0.3058,), std=(0.3193,))
    small = {
        "rounds": 1, "warmup": 1, "inversion_steps": 2, "synthesis_batch_size": 16,
        "student_steps": 2, "batch_size": 8, "generator_width": 4, "latent_dim": 8,
    }  # fmt: skip
    student = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    report = vestige.distill(
        teacher, student, method="fast", spec=spec, num_classes=10, config=small
    )
    assert isinstance(report.pool, Pool)
    assert len(report.pool) == 32
    assert report.summary["pool"]["images"] == 32
    rng = torch.Generator().manual_seed(0)
    assert report.pool.draw(5, rng).shape == (5, 1, 16, 16)
    other = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    again = vestige.distill(
        *(teacher, other),
        method="kd",
        spec=spec,
        num_classes=10,
        sources={"inputs": report.pool},
        config={"rounds": 1, "iterations": 2, "batch_size": 8},
    )
    assert again.pool is None
    assert again.summary["real_data"] == []
