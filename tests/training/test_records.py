"""The data set that a run leaves, its card and its section of the page."""

import json
from typing import Any

from vestige.training.records import brief_records, record_facts, write_records
from vestige.training.report.page import render
from vestige.training.report.run_folder import read_run
from vestige.training.summary import RunFacts

FACTS = RunFacts(
    method="a-method",
    plugins=(),
    teacher_score=0.5,
    teacher_parameters=1,
    teacher_fingerprint="f" * 64,
    real_data=(),
    seed=3,
    recipe_yaml="",
    command="vestige run it",
)


class Writer:
    """A method that wrote two texts of each of two labels."""

    def __init__(self, count: int = 4) -> None:
        self.count = count

    def records(self) -> list[dict[str, Any]]:
        return [
            {"C": None, "X": f"text {n} <b>\ud800é", "Y": "ab"[n % 2], "logprob": -float(n)}
            for n in range(self.count)
        ]

    def record_card(self) -> dict[str, Any]:
        counts = {one: {"asked": 5, "kept": 2, "dropped": {"too-short": 3}} for one in ("a", "b")}
        return {"counts": counts, "decoding": {"top_p": 0.9}}


def test_a_run_leaves_its_texts_and_how_they_came_about(tmp_path):
    card = record_facts(Writer(), FACTS)
    assert write_records(tmp_path, Writer(), card)
    lines = (tmp_path / "synthetic.jsonl").read_text(encoding="utf8").splitlines()
    assert [json.loads(line)["Y"] for line in lines] == ["a", "b", "a", "b"]
    found = json.loads((tmp_path / "synthetic.json").read_text())
    assert found["texts"] == 4 and found["seed"] == 3 and found["decoding"] == {"top_p": 0.9}
    assert found["teacher_fingerprint"] == FACTS.teacher_fingerprint
    assert found["mean_logprob"] == -1.5
    assert found["quality"]["labels"] == {"a": 2, "b": 2}
    assert brief_records(card)["asked"] == 10
    assert brief_records(card)["kept_by_label"] == {"a": 2, "b": 2}


def test_a_method_that_writes_nothing_leaves_nothing(tmp_path):
    assert record_facts(object(), FACTS) == {}
    assert record_facts(Writer(0), FACTS) == {}
    assert not write_records(tmp_path, object(), {})
    assert not list(tmp_path.iterdir())


def test_the_page_shows_counts_reasons_and_texts(tmp_path):
    write_records(tmp_path, Writer(), record_facts(Writer(), FACTS))
    page = render([read_run(tmp_path)])
    assert "What the teacher wrote" in page and "too-short" in page
    assert "4 texts were kept of 10" in page and "Self-BLEU 4" in page
    assert "text 0 &lt;b&gt;" in page and "<b>" not in page.split("What the teacher wrote")[1]


def test_a_damaged_card_leaves_the_section_out(tmp_path):
    (tmp_path / "synthetic.json").write_text("{")
    assert "What the teacher wrote" not in render([read_run(tmp_path)])
    (tmp_path / "synthetic.json").write_text('{"counts": [], "quality": 5}')
    assert "What the teacher wrote" not in render([read_run(tmp_path)])
    (tmp_path / "synthetic.json").write_text('{"counts": {"a": 5}, "quality": [], "examples": 1}')
    assert "What the teacher wrote" in render([read_run(tmp_path)])
