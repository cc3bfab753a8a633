"""What a run leaves behind, that it can be repeated and gone on with, and what arms share."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vestige.core.types import InputSpec, Result
from vestige.data.image import load_images, to_inputs
from vestige.errors import CheckpointError, DataError, RecipeError
from vestige.models.factory import build_model
from vestige.recipes.arms import run_arms
from vestige.recipes.build import build
from vestige.recipes.loading import load_recipe
from vestige.recipes.run import run_recipe
from vestige.recipes.schema import Recipe
from vestige.recipes.updates import student_updates
from vestige.tasks.classification import Classification
from vestige.teachers.loading import ImageInput, builtin_card, fingerprint, load_teacher
from vestige.training.outcome import Outcome
from vestige.training.summary import summarize
from vestige.training.tracking import Event

RUN_FILES = {
    "recipe.yaml",
    "run.json",
    "metrics.jsonl",
    "checkpoints",
    "student.safetensors",
    "student.json",
    "samples.png",
    "samples-over-time.png",
    "evaluation.json",
    "report.html",
    "summary.json",
}
# Key -> type, of schema 1.
SUMMARY = {
    "schema": int,
    "method": str,
    "plugins": list,
    "task": str,
    "metric": str,
    "teacher": dict,
    "student": dict,
    "arms": dict,
    "steps": int,
    "seconds": float,
    "peak_memory_mib": float,
    "teacher_queries": int,
    "teacher_passes": dict,
    "images_made": int,
    "real_data": list,
    "seed": int,
    "device": str,
    "versions": dict,
    "result": dict,
}
# What another run of the same thing on the same machine may differ in.
VOLATILE = {"seconds", "seconds_all_arms", "peak_memory_mib"}


class Killed(BaseException):
    """Not an Exception, so that nothing on the way may swallow it."""


@pytest.fixture
def smoke() -> Recipe:
    return load_recipe("dfad", preset="smoke", overrides=["trainer.device=cpu"])


@pytest.fixture(scope="module")
def arms_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, dict[str, Any]]:
    """The demo's arms, run once without interruption."""
    recipe = load_recipe("demo", preset="smoke", overrides=["trainer.device=cpu"])
    out = tmp_path_factory.mktemp("arms") / "run"
    return recipe, out, run_arms(recipe, out, command="vestige demo")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def numbers(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what depends on the moment, at every level."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in VOLATILE}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return json.loads(json.dumps(strip(summary)))


def kill_at(kind: str, number: int = 1):
    """A callback that kills at the given event of a kind."""
    seen = {"count": 0}

    def kill(event: Event) -> None:
        if event.kind == kind:
            seen["count"] += 1
            if seen["count"] == number:
                raise Killed

    return kill


# One run


def test_a_run_leaves_the_documented_files_and_nothing_else(smoke: Recipe, tmp_path: Path):
    run_recipe(smoke, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == RUN_FILES
    assert not list(tmp_path.rglob("*.partial"))
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_the_summary_has_every_key_of_schema_1(smoke: Recipe, tmp_path: Path):
    summary = run_recipe(smoke, tmp_path / "run")
    assert json.loads((tmp_path / "run/summary.json").read_text()) == json.loads(
        json.dumps(summary)
    )
    for key, kind in SUMMARY.items():
        assert isinstance(summary[key], kind), key
    assert summary["schema"] == 1
    assert set(summary["teacher"]) >= {"score", "parameters"}
    assert set(summary["student"]) >= {"score", "best_score", "parameters"}
    assert summary["result"] == {"kind": "student", "path": "student.safetensors"}
    assert (summary["method"], summary["plugins"], summary["task"]) == (
        "dfad",
        [],
        "classification",
    )
    assert (summary["metric"], summary["seed"], summary["device"]) == ("accuracy", 0, "cpu")
    assert set(summary["versions"]) >= {"python", "vestige", "torch", "numpy"}
    # 2 rounds of 2 iterations of 5 + 1 steps of 16 rows
    assert (summary["steps"], summary["teacher_queries"]) == (24, 384)
    # The generator's updates alone go back through the teacher, and teach the student nothing.
    assert summary["teacher_passes"] == {"forward": 384, "backward": 2 * 2 * 16}
    assert summary["images_made"] == 2 * 2 * 5 * 16
    assert summary["teacher"]["parameters"] == builtin_card("digits-convnet").parameters
    assert summary["teacher"]["score"] == builtin_card("digits-convnet").accuracy


def test_what_is_replayed_is_made_once(smoke: Recipe, tmp_path: Path):
    replaying = smoke.model_copy(update={"config": {**smoke.config, "replay": 0.25}})
    summary = run_recipe(replaying, tmp_path / "run", report=False)
    # Nothing is there to replay in the first iteration; then 4 of 16 rows are.
    assert summary["images_made"] == 5 * 16 + 3 * 5 * 12
    assert summary["teacher_passes"]["forward"] == 384


def test_the_score_is_the_last_and_the_best_is_told_apart(smoke: Recipe, tmp_path: Path):
    job = build(smoke)
    scores = [
        {"step": float(step), "accuracy": value} for step, value in enumerate((0.2, 0.5, 0.3))
    ]
    outcome = Outcome(Result("student", job.student), scores)
    student = summarize(job.facts, outcome, job.task, job.student, torch.device("cpu"))["student"]
    assert (student["score"], student["best_score"]) == (0.3, 0.5)

    summary = run_recipe(smoke, tmp_path / "run", report=False)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = [row["scores"]["accuracy"] for row in rows if row["kind"] == "evaluation"]
    assert len(found) == 2
    assert summary["student"]["score"] == found[-1]
    assert summary["student"]["best_score"] == max(found)


def test_without_data_nothing_is_judged_and_the_run_still_ends(smoke: Recipe, tmp_path: Path):
    summary = run_recipe(smoke.model_copy(update={"data": None}), tmp_path / "run")
    assert summary["teacher"]["score"] is summary["student"]["score"] is None
    assert summary["student"]["best_score"] is None
    assert summary["real_data"] == []


def test_the_students_file_is_the_student_that_was_judged(smoke: Recipe, tmp_path: Path):
    out = tmp_path / "run"
    summary = run_recipe(smoke, out, report=False)
    card = json.loads((out / "student.json").read_text())
    spec = ImageInput(**card["input"]).spec()
    assert isinstance(spec, InputSpec)
    student = build_model(card["model"], spec, card["num_classes"], **card["args"])
    student.load_state_dict(load_file(out / card["weights"]))
    test = load_images("digits", "test")
    data = (to_inputs(test.images, spec), torch.from_numpy(test.labels))
    scores = Classification(spec, card["num_classes"]).evaluate(student, data)
    assert scores["accuracy"] == summary["student"]["score"]
    assert card["classes"] == list(test.classes)
    # The card is all that is needed for the student to teach in its turn.
    again = load_teacher(out / "student.json")
    assert fingerprint(again) == fingerprint(student)


def test_the_run_record_says_what_was_read_by_whom_and_for_what(smoke: Recipe, tmp_path: Path):
    run_recipe(smoke, tmp_path / "run", command="vestige run dfad", report=False)
    record = json.loads((tmp_path / "run/run.json").read_text())
    test = load_images("digits", "test")
    assert record["real_data"] == [
        {
            "name": "digits/test",
            "origin": "real",
            "by": "evaluation",
            "purpose": "evaluation",
            "images": 500,
            "fingerprint": test.fingerprint,
        }
    ]
    assert record["teacher_fingerprint"] == builtin_card("digits-convnet").weights_fingerprint
    assert (record["command"], record["seed"]) == ("vestige run dfad", 0)
    assert set(record) >= {"schema", "started", "versions", "machine"}


# Again


def test_the_folders_recipe_gives_the_same_student_bit_for_bit(smoke: Recipe, tmp_path: Path):
    run_recipe(smoke, tmp_path / "a", report=False)
    again = load_recipe(tmp_path / "a/recipe.yaml")
    run_recipe(again, tmp_path / "b", report=False)
    first, second = (digest(tmp_path / name / "student.safetensors") for name in "ab")
    assert first == second


def test_another_seed_gives_another_student(smoke: Recipe, tmp_path: Path):
    run_recipe(smoke, tmp_path / "a", report=False)
    run_recipe(smoke.model_copy(update={"seed": 1}), tmp_path / "b", report=False)
    first, second = (digest(tmp_path / name / "student.safetensors") for name in "ab")
    assert first != second


def test_what_was_drawn_before_a_run_does_not_matter(smoke: Recipe, tmp_path: Path):
    run_recipe(smoke, tmp_path / "a", report=False)
    torch.manual_seed(99)
    torch.randn(7)
    run_recipe(smoke, tmp_path / "b", report=False)
    first, second = (digest(tmp_path / name / "student.safetensors") for name in "ab")
    assert first == second


def test_a_folder_in_use_is_refused(smoke: Recipe, tmp_path: Path):
    run_recipe(smoke, tmp_path / "run", report=False)
    before = {path: digest(path) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match=r"--out: .* is not empty; add --resume"):
        run_recipe(smoke, tmp_path / "run")
    assert before == {p: digest(p) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"is a file, expected a folder"):
        run_recipe(smoke, tmp_path / "file")


def test_resuming_a_finished_run_changes_no_number(smoke: Recipe, tmp_path: Path):
    first = run_recipe(smoke, tmp_path / "run")
    student = digest(tmp_path / "run/student.safetensors")
    metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
    second = run_recipe(smoke, tmp_path / "run", resume=True)
    assert numbers(second) == numbers(first)
    assert digest(tmp_path / "run/student.safetensors") == student
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics
    assert {path.name for path in (tmp_path / "run").iterdir()} == RUN_FILES


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("config.rounds=3", "config.rounds"),
        ("config.generator_lr=1e-4", "config.generator_lr"),
        ("student.args.widths=[4, 8, 16]", "student.args.widths"),
        ("seed=1", "seed"),
        ("data=null", "data"),
    ],
)
def test_another_recipe_is_not_resumed_and_the_folder_stays(
    override: str, named: str, smoke: Recipe, tmp_path: Path
):
    out = tmp_path / "run"
    run_recipe(smoke, out, report=False)
    before = {path: digest(path) for path in out.rglob("*") if path.is_file()}
    other = load_recipe("dfad", preset="smoke", overrides=["trainer.device=cpu", override])
    with pytest.raises((RecipeError, CheckpointError)) as caught:
        run_recipe(other, out, resume=True)
    assert f"({named})" in str(caught.value)
    assert before == {path: digest(path) for path in out.rglob("*") if path.is_file()}


def test_another_teacher_under_the_same_name_is_not_resumed(tmp_path: Path):
    from safetensors.torch import save_file

    card = builtin_card("digits-convnet")
    weights = tmp_path / "teacher.safetensors"
    recipe = load_recipe(
        "kd",
        preset="smoke",
        overrides=[
            f"teacher={{model: convnet, args: {{widths: [4, 4, 4]}}, weights: {weights}}}",
            f"input={card.input.model_dump(mode='json')}",
            "num_classes=10",
        ],
    )
    for seed in (0, 1):
        torch.manual_seed(seed)
        made = build_model("convnet", card.input.spec(), 10, widths=[4, 4, 4])
        save_file(made.state_dict(), weights)
        if seed == 0:
            run_recipe(recipe, tmp_path / "run", report=False)
    record = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(CheckpointError, match="teacher_fingerprint"):
        run_recipe(recipe, tmp_path / "run", resume=True)
    assert (tmp_path / "run/run.json").read_bytes() == record


def test_more_time_is_no_other_recipe(smoke: Recipe, tmp_path: Path):
    trainer = smoke.trainer.model_copy(update={"max_steps": 12})
    short = smoke.model_copy(update={"trainer": trainer})
    first = run_recipe(short, tmp_path / "run", report=False)
    assert (first["complete"], first["steps"]) == (False, 12)
    second = run_recipe(smoke, tmp_path / "run", resume=True, report=False)
    whole = run_recipe(smoke, tmp_path / "whole", report=False)
    assert second["complete"]
    assert numbers(second) == numbers(whole)
    first, second = (digest(tmp_path / n / "student.safetensors") for n in ("run", "whole"))
    assert first == second


def test_a_killed_run_goes_on_and_leaves_the_same(smoke: Recipe, tmp_path: Path):
    whole = run_recipe(smoke, tmp_path / "whole", report=False)
    with pytest.raises(Killed):
        run_recipe(smoke, tmp_path / "run", callbacks=[kill_at("round")], report=False)
    assert not (tmp_path / "run/summary.json").exists()
    resumed = run_recipe(smoke, tmp_path / "run", resume=True, report=False)
    assert numbers(resumed) == numbers(whole)
    first, second = (digest(tmp_path / n / "student.safetensors") for n in ("run", "whole"))
    assert first == second


def test_resume_in_an_empty_folder_starts_from_the_beginning(smoke: Recipe, tmp_path: Path):
    (tmp_path / "run").mkdir()
    assert run_recipe(smoke, tmp_path / "run", resume=True, report=False)["steps"] == 24


# Arms


def test_a_run_of_arms_leaves_one_folder_each_and_one_whole(arms_run):
    recipe, out, summary = arms_run
    assert {path.name for path in out.iterdir()} == {
        *(RUN_FILES - {"checkpoints"}),
        "arms",
    }
    assert {path.name for path in (out / "arms").iterdir()} == set(recipe.arms)
    for name in recipe.arms:
        found = {path.name for path in (out / "arms" / name).iterdir()}
        kept = {"pool"} if recipe.arm(name).method == "cmi" else set()
        assert found == RUN_FILES - {"report.html"} | kept
    for key, kind in SUMMARY.items():
        assert isinstance(summary[key], kind), key
    assert list(summary["arms"]) == list(recipe.arms)


def test_the_whole_is_the_headline_arms_and_no_score_chooses_it(arms_run):
    recipe, out, summary = arms_run
    assert recipe.headline == summary["headline"] == "dfad-bn"
    for file in (
        *("student.safetensors", "student.json", "samples.png", "samples-over-time.png"),
        "evaluation.json",
    ):
        assert digest(out / file) == digest(out / "arms/dfad-bn" / file)
    own = json.loads((out / "arms/dfad-bn/summary.json").read_text())
    assert summary["student"] == own["student"]
    assert summary["real_data"] == own["real_data"]
    for name, score in summary["arms"].items():
        alone = json.loads((out / "arms" / name / "summary.json").read_text())
        assert score == alone["student"]["score"]
    # At this size the data-free arm is not the best one, so that a choice by score would show.
    assert summary["student"]["score"] < max(summary["arms"].values())


def test_only_the_real_arm_reads_real_data_to_train(arms_run):
    recipe, out, summary = arms_run
    for name in recipe.arms:
        read = json.loads((out / "arms" / name / "run.json").read_text())["real_data"]
        told = [(item["name"], item["by"], item["purpose"]) for item in read]
        expected = {("digits/test", "evaluation", "evaluation")}
        assert set(told) == expected | (
            {("digits/train", "real", "distillation")} if name == "real" else set()
        )
    rows = {row["name"]: row for row in summary["arm_details"]}
    assert rows["real"]["real_images_read"] == len(load_images("digits", "train"))
    assert [name for name, row in rows.items() if not row["data_free"]] == ["real"]
    whole = json.loads((out / "run.json").read_text())["real_data"]
    assert {item["purpose"] for item in whole} == {"evaluation", "distillation"}


def test_all_arms_start_from_the_same_student_and_make_the_same_number_of_its_steps(arms_run):
    recipe, out, _ = arms_run
    starts, steps = set(), set()
    for name in recipe.arms:
        starts.add(fingerprint(build(recipe.arm(name)).student))
        cfg = recipe.arm(name).method_config()
        summary = json.loads((out / "arms" / name / "summary.json").read_text())
        method = recipe.arm(name).method
        made = student_updates(method, cfg.model_dump())
        source = {"dfad": cfg.rounds * getattr(cfg, "iterations", 0), "kd": 0}.get(method)
        if source is None:
            batches = cfg.warmup + cfg.rounds * cfg.batches_per_round
            source = batches * cfg.inversion_steps
        assert summary["steps"] == made + source
        steps.add((made, cfg.batch_size))
    assert len(starts) == 1
    assert steps == {(20, 16)}


def test_the_gap_is_measured_from_the_baseline_to_the_reference(arms_run):
    _, _, summary = arms_run
    rows = {row["name"]: row for row in summary["arm_details"]}
    low, high = rows["noise"]["score"], rows["real"]["score"]
    for row in rows.values():
        if high > low:
            assert row["gap_closed"] == pytest.approx((row["score"] - low) / (high - low))
        else:
            assert row["gap_closed"] is None


def test_arms_killed_in_the_third_one_go_on_and_leave_the_same(arms_run, tmp_path: Path):
    recipe, whole, expected = arms_run
    third = list(recipe.arms)[2]
    with pytest.raises(Killed):
        run_arms(
            recipe,
            tmp_path / "run",
            callbacks=lambda arm: [kill_at("round", 1)] if arm == third else [],
        )
    assert not (tmp_path / "run/summary.json").exists()
    started = []
    resumed = run_arms(
        recipe,
        tmp_path / "run",
        resume=True,
        callbacks=lambda arm: [lambda event: started.append(arm)],
        command="vestige demo",
    )
    assert set(started) == set(list(recipe.arms)[2:]), "finished arms were run again"
    assert numbers(resumed) == numbers(expected)
    for name in recipe.arms:
        file = Path("arms") / name / "student.safetensors"
        assert digest(tmp_path / "run" / file) == digest(whole / file)


def test_finished_arms_of_another_recipe_are_not_taken_for_this_ones(arms_run):
    recipe, out, _ = arms_run
    before = (out / "recipe.yaml").read_bytes()
    other = recipe.model_copy(update={"seed": 1})
    with pytest.raises(RecipeError, match=r"other settings \(seed\)"):
        run_arms(other, out, resume=True)
    assert (out / "recipe.yaml").read_bytes() == before


def test_a_recipe_without_arms_has_none_to_run(smoke: Recipe, tmp_path: Path):
    with pytest.raises(RecipeError, match="has no arms"):
        run_arms(smoke, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_processes_do_not_share_a_folder(tmp_path):
    from vestige.training.files import locked

    out = tmp_path / "run"
    with locked(out), pytest.raises(RecipeError, match="another process is running in"):
        run_recipe(load_recipe("kd", preset="smoke"), out)
    assert run_recipe(load_recipe("kd", preset="smoke"), out)["steps"] == 4
    assert not (out / ".lock").exists()


def test_data_of_other_classes_is_refused_before_training(tmp_path):
    folder = tmp_path / "four"
    folder.mkdir()
    images = np.zeros((8, 16, 16), dtype=np.uint8)
    for split in ("train", "test"):
        np.savez(folder / f"{split}.npz", x=images, y=np.arange(8) % 4, classes=list("abcd"))
    with pytest.raises(DataError, match=r"got 4 classes in .*, expected the 10"):
        run_recipe(load_recipe("kd", preset="smoke", overrides=[f"data={folder}"]), tmp_path / "r")


def test_arms_with_other_teachers_are_not_compared(tmp_path):
    out = tmp_path / "run"
    recipe = load_recipe("demo", preset="smoke")
    run_arms(recipe, out)
    record = json.loads((out / "arms/noise/run.json").read_text())
    (out / "arms/noise/run.json").write_text(
        json.dumps({**record, "teacher_fingerprint": "0" * 64})
    )
    with pytest.raises(RecipeError, match="had different teachers"):
        run_arms(recipe, out, resume=True)


def test_arms_that_a_budget_stopped_go_on(tmp_path):
    out = tmp_path / "run"
    short = load_recipe("demo", preset="smoke", overrides=["trainer.max_steps=1"])
    stopped = run_arms(short, out)
    assert not stopped["complete"]
    whole = run_arms(load_recipe("demo", preset="smoke"), out, resume=True)
    assert whole["complete"]
    assert whole["steps"] > stopped["steps"]
