"""A language model in a folder of transformers as the teacher of a recipe, from end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ngram import TOPICS, made_up

from vestige.errors import RecipeError, TeacherError
from vestige.recipes.loading import validate
from vestige.recipes.run import run_recipe

pytest.importorskip("transformers", reason="needs transformers: pip install 'vestige[text]'")

PAIRS = {
    "kind": "pair",
    "prompt": '"<C>" <L>: "',
    "per_context": 4,
    "min_words": 2,
    "new_tokens": 12,
    "debias": True,
    "labels": {"sports": {}, "business": {}},
}
QUESTIONS = {
    "kind": "qa",
    "ends_with": "?",
    "prompt": '"<C>" about <Y>, sports: "',
    "min_words": 3,
    "per_context": 2,
    "new_tokens": 24,
    "labels": {"answer": {}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny_lm

    return tiny_lm.save(tmp_path_factory.mktemp("lm"))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made-up news that judges, and passages that nobody labelled."""
    sets = {
        "news": made_up(60, 1),
        "passages": [(f"Paris met {name} in 1987. Rome did not.", 0) for name in "ABCDEFGH"],
    }
    for name, rows in sets.items():
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "news" / "classes.json").write_text(json.dumps([*TOPICS]))
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path))
    return tmp_path


def recipe(folder: Path, prompts: Path | str, **given: Any) -> Any:
    config = {"samples": 80, "round_texts": 40, "epochs": 4, "student_lr": 0.05}
    raw = {
        "method": "zerogen",
        "task": "text",
        "teacher": {"lm": str(folder), "prompts": str(prompts)},
        "student": {"name": "tfidf-linear"},
        "trainer": {"device": "cpu"},
        **given,
    }
    return validate({**raw, "config": {**config, **given.get("config", {})}})


def about(name: str) -> dict[str, Any]:
    return {"contexts": {"kind": "images", "data": name, "origin": "unlabelled"}}


def written(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "synthetic.jsonl").read_text().splitlines()]


def test_a_folder_and_prompts_of_ones_own_teach_a_student(folder, data, tmp_path):
    summary = run_recipe(recipe(folder, folder / "mine.yaml", data="news"), tmp_path / "run")
    # Four topics; the writer is tiny, but knows their words.
    assert summary["student"]["score"] > 0.6
    assert summary["records"]["correctness"]["agreement"] > 0.6
    # It can be asked for its own judgement, too.
    assert summary["teacher"]["score"] > 0.5 and summary["teacher"]["parameters"] > 10_000
    for line in lines_of(tmp_path / "run"):
        assert '"' not in line["X"] and len(line["X"].split()) >= 3 and line["logprob"] < 0


def test_pairs_are_written_about_given_texts_and_pushed_from_the_other_label(
    folder, data, tmp_path
):
    prompts = written(tmp_path / "pairs.yaml", PAIRS)
    runs = {}
    for name, decay in (("debiased", 200.0), ("plain", 0.0)):
        config = {"debias_decay": decay, "samples": 24, "epochs": 1}
        made = recipe(folder, prompts, sources=about("passages"), config=config)
        summary = run_recipe(made, tmp_path / name)
        runs[name] = lines_of(tmp_path / name)
        card = json.loads((tmp_path / name / "synthetic.json").read_text())
        assert card["decoding"]["debias_decay"] == decay
        assert summary["student"]["parameters"] > 0
        # Given texts count as read to learn from, and have no labels.
        assert [one["origin"] for one in summary["real_data"]] == ["unlabelled"]
    assert {line["Y"] for line in runs["debiased"]} == {"sports", "business"}
    assert all(line["C"].startswith("Paris met") for line in runs["debiased"])
    assert runs["debiased"] != runs["plain"]


def test_questions_are_left_as_records_without_a_student(folder, data, tmp_path):
    prompts = written(tmp_path / "qa.yaml", QUESTIONS)
    made = recipe(
        folder,
        prompts,
        student=None,
        sources=about("passages"),
        config={"samples": 12, "rounds": 6},
    )
    summary = run_recipe(made, tmp_path / "run")
    assert summary["result"] == {"kind": "texts", "path": "synthetic.jsonl"}
    assert summary["student"] is None
    found = lines_of(tmp_path / "run")
    assert found
    for line in found:
        start = line["answer_start"]
        assert line["C"][start : start + len(line["answer"])] == line["answer"]
        assert line["X"].endswith("?") and line["answer"].lower() not in line["X"].lower()


def test_what_is_no_language_model_is_told(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TeacherError, match=r"a folder with config\.json"):
        run_recipe(recipe(tmp_path / "empty", folder / "mine.yaml"), tmp_path / "run")
    wrong = {**PAIRS, "prompt": '"<C>" <L>: '}
    with pytest.raises(RecipeError, match="expected an opening double quote"):
        recipe(folder, written(tmp_path / "wrong.yaml", wrong))


@pytest.mark.slow
def test_a_kill_in_the_middle_of_writing_leaves_no_trace(folder, data, tmp_path):
    config = {"samples": 400, "round_texts": 16, "epochs": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(folder, folder / "mine.yaml", data="news", config=config).to_yaml())

    def command(name: str, *more: str) -> list[str]:
        start = "from vestige.cli.main import main; main()"
        return [sys.executable, "-c", start, "run", str(path), "--out", str(tmp_path / name), *more]

    quiet: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.run(command("whole"), check=False, env=environment, **quiet)
    assert whole.returncode == 0, whole.stdout[-3000:]
    first = subprocess.Popen(command("killed"), env=environment, **quiet)
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "killed/checkpoints/shards").glob("*.pool-*"))) < 3:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert first.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "synthetic.jsonl").exists()
    again = subprocess.run(command("killed", "--resume"), check=False, env=environment, **quiet)
    assert again.returncode == 0, again.stdout[-3000:]
    for name in ("synthetic.jsonl", "student.safetensors"):
        left = [(tmp_path / run / name).read_bytes() for run in ("whole", "killed")]
        assert left[0] == left[1], name
