"""The section of the page: from whatever selection.json holds."""

import json
import re
from pathlib import Path

from vestige.training.report.page import render
from vestige.training.report.page_selection import selection_view
from vestige.training.report.run_folder import read_run

FOUND = {
    "schema": 1,
    "sources": {
        "foreign": {
            "rows": 1200,
            "seen": 4000,
            "kept": 1000,
            "keep_rate": 0.25,
            "precision": 0.6,
            "recall": 0.5,
            "base_rate": 0.3,
            "parts": {
                "photos <b>": {"wanted": True, "rows": 300, "seen": 1200, "kept": 600,
                               "keep_rate": 0.5},
                "unknown": {"wanted": None, "rows": 300, "seen": 0, "kept": 0, "keep_rate": None},
                "junk": {"wanted": False, "rows": 600, "seen": 2800, "kept": 400,
                         "keep_rate": 0.143},
            },
        }
    },
}  # fmt: skip


def folder(tmp_path: Path, found: object) -> Path:
    (tmp_path / "selection.json").write_text(json.dumps(found))
    return tmp_path


def text(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).replace("\u00a0", " ").split())


def test_the_figures_are_told_in_words_and_by_part(tmp_path: Path) -> None:
    page = text(render([read_run(folder(tmp_path, FOUND))]))
    assert (
        "25.0 % of what it looked at was learned from. Of that 60.0 % is wanted, where chance "
        "gives 30.0 %; 50.0 % of the wanted looks were kept."
    ) in page
    assert "photos &lt;b&gt; yes 300 1,200 600 50.0 %" in page
    assert "junk no 600 2,800 400 14.3 %" in page
    assert "all 1,200 4,000 1,000 25.0 %" in page


def test_a_source_without_parts_is_one_row(tmp_path: Path) -> None:
    plain = {"rows": 9, "seen": 18, "kept": 9, "keep_rate": 0.5}
    page = text(render([read_run(folder(tmp_path, {"schema": 1, "sources": {"web": plain}}))]))
    assert "50.0 % of what it looked at was learned from. " in page and "wanted, where" not in page
    assert "web 9 18 9 50.0 %" in page and "Wanted" not in page


def test_runs_without_a_choice_have_no_section(tmp_path: Path) -> None:
    assert "What it chose" not in render([read_run(tmp_path)])
    for damaged in ([], {}, {"sources": []}, {"sources": {"a": 3}}):
        run = read_run(folder(tmp_path, damaged))
        assert selection_view(run) is None


def test_strange_values_are_unknown_and_not_an_error(tmp_path: Path) -> None:
    strange = {"rows": "many", "parts": {"a": {"wanted": [1], "kept": None}, "b": 4}}
    (tmp_path / "selection.png").write_bytes(b"\x89PNG torn")
    page = text(render([read_run(folder(tmp_path, {"sources": {"web": strange}}))]))
    assert "What it chose" in page
    assert "selection.png is damaged or cut off and was left out." in page
