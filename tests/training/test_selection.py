"""What a method says it chose: the figures by hand, the picture, and the files of a run."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vestige.core.rows import Selection
from vestige.core.types import InputSpec
from vestige.sources.images import TensorSource
from vestige.sources.noise import NoiseSource
from vestige.sources.stored import StoredHeap
from vestige.training.pictures import contact_sheet
from vestige.training.selection import (
    brief,
    selection_facts,
    selection_sheet,
    write_selection,
)

SPEC = InputSpec.image(1, 8, 8, mean=(0.3,), std=(0.2,))
PARTS = {"right": True, "unknown": None, "wrong": False}


def heap(count: int = 9) -> StoredHeap:
    """Rows 0, 3, 6 are right, 1, 4, 7 unknown, 2, 5, 8 wrong; row i is all of grey 20 i."""
    images = np.repeat(np.arange(count, dtype=np.uint8) * 20, 64).reshape(count, 8, 8)
    return StoredHeap(
        images,
        SPEC,
        origin="foreign",
        name="heap",
        parts=PARTS,
        part_index=np.arange(count) % 3,
    )


def chosen(seen: list[int], kept: list[int]) -> Selection:
    found = Selection(len(seen))
    found.seen, found.kept = torch.tensor(seen).int(), torch.tensor(kept).int()
    return found


class Choosy:
    def __init__(self, **selections: Selection) -> None:
        self._selections = selections

    def selections(self) -> Mapping[str, Selection]:
        return self._selections


#        right: 4 + 0 + 2, unknown: 5 + 1 + 0, wrong: 3 + 3 + 0
SEEN = [4, 5, 3, 0, 1, 3, 2, 0, 0]
KEPT = [3, 1, 1, 0, 1, 0, 2, 0, 0]


def test_the_figures_are_those_of_the_definition() -> None:
    facts = selection_facts(Choosy(foreign=chosen(SEEN, KEPT)), {"foreign": heap()})["foreign"]
    assert (facts["rows"], facts["rows_seen"], facts["seen"], facts["kept"]) == (9, 6, 18, 8)
    assert facts["keep_rate"] == 8 / 18
    # By how often, and of the parts of which it is known: 5 of 6 kept, 6 of 12 looked at.
    assert facts["precision"] == 5 / 6
    assert facts["recall"] == 5 / 6
    assert facts["base_rate"] == 6 / 12
    assert facts["parts"]["unknown"] == {
        "wanted": None, "rows": 3, "seen": 6, "kept": 2, "keep_rate": 2 / 6,
    }  # fmt: skip
    assert facts["parts"]["wrong"]["kept"] == 1
    assert list(brief({"foreign": facts})["foreign"]) == [
        "keep_rate", "precision", "recall", "base_rate",
    ]  # fmt: skip


def test_chance_has_the_precision_of_the_base_rate() -> None:
    seen = [10] * 9
    kept = [4] * 9
    facts = selection_facts(Choosy(a=chosen(seen, kept)), {"a": heap()})["a"]
    assert facts["precision"] == facts["base_rate"] == 0.5 and facts["recall"] == 0.4


def test_what_was_not_looked_at_has_no_rate() -> None:
    none = [0] * 9
    facts = selection_facts(Choosy(a=chosen(none, none)), {"a": heap()})["a"]
    for key in ("keep_rate", "precision", "recall", "base_rate"):
        assert facts[key] is None
    assert json.loads(json.dumps(facts)) == facts


def test_without_parts_there_is_no_precision() -> None:
    plain = TensorSource(torch.zeros(9, 1, 8, 8), origin="foreign", name="plain")
    facts = selection_facts(Choosy(a=chosen(SEEN, KEPT)), {"a": plain})["a"]
    assert "precision" not in facts and "parts" not in facts
    # Nor where nobody knows which part is wanted.
    unknown = heap()
    unknown.parts = dict.fromkeys(PARTS)
    facts = selection_facts(Choosy(a=chosen(SEEN, KEPT)), {"a": unknown})["a"]
    assert "precision" not in facts and len(facts["parts"]) == 3


def test_a_method_that_does_not_choose_has_no_report(tmp_path: Path) -> None:
    assert selection_facts(object(), {"a": heap()}) == {}
    assert not write_selection(tmp_path, object(), {"a": heap()}, SPEC, {})
    assert list(tmp_path.iterdir()) == []


def test_the_picture_shows_what_was_kept_and_dropped_most_by_part() -> None:
    sheet = selection_sheet({"a": chosen(SEEN, KEPT)}, {"a": heap()}, SPEC)
    # Kept: 0 three times, 6 twice, then 1, 2, 4 once. Dropped: 1 four times, 5 three, 2 two, 0 one.
    rows = torch.tensor([0, 6, 1, 4, 2, 1, 5, 2, 0])
    labels = ["kept: right"] * 2 + ["kept: unknown"] * 2 + ["kept: wrong"]
    labels += ["dropped: unknown"] + ["dropped: wrong"] * 2 + ["dropped: right"]
    images = (rows * 20 / 255).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    assert sheet is not None
    assert np.array_equal(sheet, contact_sheet(images, columns=10, scale=6, labels=labels))


def test_at_most_thirty_of_each_are_shown() -> None:
    source = TensorSource(torch.zeros(100, 1, 8, 8), origin="foreign", name="plain")
    sheet = selection_sheet({"a": chosen([2] * 100, [1] * 100)}, {"a": source}, SPEC)
    # Three rows of ten 48 pixels wide tiles kept, and three dropped, with a gap of 2.
    assert sheet is not None and sheet.shape[0] == 2 + 6 * 50


def test_what_cannot_be_drawn_is_not() -> None:
    table = InputSpec("table", (4,))
    rows = TensorSource(torch.zeros(9, 4), origin="foreign", name="table")
    assert selection_sheet({"a": chosen(SEEN, KEPT)}, {"a": rows}, table) is None
    assert selection_sheet({"a": chosen(SEEN, KEPT)}, {"a": NoiseSource(SPEC)}, SPEC) is None
    assert selection_sheet({"a": chosen([0] * 9, [0] * 9)}, {"a": heap()}, SPEC) is None


RUN = """
import torch
from vestige.core import modes, optim
from vestige.core.rows import Selection
from vestige.core.types import Batch, predict
from vestige.methods.kd import KD, KDConfig


class Sure(KD):
    'Learns from what the teacher is sure of.'

    Config = KDConfig

    def __init__(self, *given):
        super().__init__(*given)
        self.chosen = Selection(len(self.source))

    def selections(self):
        return {"inputs": self.chosen}

    def parts(self):
        return {**super().parts(), "chosen": self.chosen}

    def run(self, ctx):
        optimizer = ctx.optimizer("student", self.student.parameters(), optim.factory("adam", 1e-3))
        modes.train_mode(self.student)
        for _ in ctx.rounds("distill", self.cfg.rounds):
            for _ in range(self.cfg.iterations):
                shape = (self.cfg.batch_size,)
                index = torch.randint(len(self.source), shape, generator=ctx.rng)
                inputs = self.source.rows(index)
                with torch.no_grad():
                    sure = predict(self.teacher, inputs).logits.softmax(1).amax(1)
                keep = sure >= sure.median()
                self.chosen.note(index, keep)
                batch = Batch(inputs=inputs[keep])
                yield ctx.update("student", self.student, self.imitation, batch, optimizer)
"""


@pytest.fixture
def sure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A recipe with a method that chooses, on digits among noise."""
    (tmp_path / "choosing.py").write_text(RUN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    parts = {
        "digits": {"data": "digits", "count": 100, "wanted": True},
        "junk": {"data": "noise", "count": 100, "wanted": False},
    }
    yield {
        "method": "choosing:Sure",
        "data": "digits",
        "teacher": "builtin:digits-convnet",
        "student": {"name": "convnet", "args": {"widths": [4]}},
        "trainer": {"device": "cpu"},
        "sources": {"inputs": {"kind": "heap", "parts": parts}},
        "config": {"rounds": 2, "iterations": 5, "batch_size": 32},
    }
    sys.modules.pop("choosing", None)


def test_a_run_leaves_figures_picture_and_a_section_of_its_page(
    sure: dict[str, Any], tmp_path: Path
) -> None:
    from vestige.recipes.loading import validate
    from vestige.recipes.run import run_recipe

    out = tmp_path / "out"
    summary = run_recipe(validate(sure), out)
    found = json.loads((out / "selection.json").read_text())
    assert found["schema"] == 1
    inputs = found["sources"]["inputs"]
    assert inputs["seen"] == 2 * 5 * 32 and inputs["rows"] == 200
    assert summary["selection"]["inputs"] == {
        key: inputs[key] for key in ("keep_rate", "precision", "recall", "base_rate")
    }
    assert (out / "selection.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert "What it chose" in page
    for part in ("digits", "junk"):
        assert f'<th scope="row">{part}</th>' in page


def test_arms_show_the_choice_of_the_headline(sure: dict[str, Any], tmp_path: Path) -> None:
    from vestige.recipes.arms import run_arms
    from vestige.recipes.loading import validate

    arms = {"chosen": {"title": "Chosen"}, "all": {"title": "All", "method": "kd"}}
    arms["all"]["config"] = {"rounds": 1, "iterations": 1}  # type: ignore[assignment]
    arms["all"]["sources"] = sure["sources"]
    recipe = validate({**sure, "arms": arms, "headline": "chosen"})
    summary = run_arms(recipe, tmp_path / "out")
    assert summary["selection"]["inputs"]["precision"] is not None
    assert (tmp_path / "out" / "selection.png").is_file()
    assert "What it chose" in (tmp_path / "out" / "report.html").read_text()


def test_counts_come_back_with_a_checkpoint(sure: dict[str, Any], tmp_path: Path) -> None:
    """A run that is cut off and resumed tells the same as one that was not."""
    from vestige.recipes.loading import validate
    from vestige.recipes.run import run_recipe

    whole = run_recipe(validate(sure), tmp_path / "whole")
    cut = {**sure, "trainer": {"device": "cpu", "max_steps": 5}}
    assert not run_recipe(validate(cut), tmp_path / "cut")["complete"]
    resumed = run_recipe(validate(sure), tmp_path / "cut", resume=True)
    assert resumed["selection"] == whole["selection"]


def test_rows_on_any_device_are_read_by_number() -> None:
    class Elsewhere(TensorSource):
        def rows(self, index: Tensor) -> Tensor:
            assert index.dtype == torch.int64 and index.device.type == "cpu"
            return super().rows(index)

    source = Elsewhere(torch.zeros(9, 1, 8, 8), origin="foreign", name="plain")
    assert selection_sheet({"a": chosen(SEEN, KEPT)}, {"a": source}, SPEC) is not None
