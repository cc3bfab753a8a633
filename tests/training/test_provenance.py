"""Every item stands in the record once, and the truth comes from the source after the run."""

import base64
import io
import json
import wave
from pathlib import Path
from typing import Any

import pytest
import torch

from vestige.core.filtering import Filtered, Item, Rule
from vestige.errors import StorageError
from vestige.sources.audio import AudioSource
from vestige.training import files
from vestige.training.clips import wave_bytes
from vestige.training.provenance import write_provenance
from vestige.training.report import write_report

SAID = ["one", "two", None, ""]


class Task:
    normalizer = "none"


class Filters:
    """Keeps the first half by its score, and never sees a truth."""

    def __init__(self, source: AudioSource | None, heard: list[str]) -> None:
        self.source, self.heard = source, heard

    def filtered(self) -> dict[str, Filtered]:
        scores = torch.linspace(1, 0, len(self.heard), dtype=torch.float64)
        kept = Rule("high", keep_fraction=0.5).kept(scores)
        items = [
            Item(
                text,
                bool(kept[row]),
                "" if kept[row] else "sure",
                {"sure": float(scores[row]), "none": None},
                {"row": row},
                None if self.source is None else self.source.rows(torch.tensor([row]))[0],
                8000,
            )
            for row, text in enumerate(self.heard)
        ]
        counts = {"kept": int(kept.sum()), "sure": int((~kept).sum())}
        filters = {"sure": {"better": "high", "threshold": 0.5}, "none": {"better": "low"}}
        return {"audio": Filtered(items, counts, filters, "sure")}


@pytest.fixture
def source() -> AudioSource:
    sounds = torch.sin(torch.arange(800) / 5).repeat(4, 1) * torch.tensor(
        [[0.1], [0.2], [0.3], [0.4]]
    )
    return AudioSource(
        sounds,
        8000,
        origin="unlabelled",
        name="heap",
        parts={"good": True, "bad": False},
        part_index=torch.tensor([0, 0, 1, 1]),
        texts=SAID,
        ids=["a.wav", "b.wav", "c.wav", "d.wav"],
    )


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "provenance.jsonl").read_text().splitlines()]


def test_each_item_has_a_line_with_its_scores_and_the_truth(source, tmp_path):
    heard = ["one", "too", "x", "<b>noise</b>"]
    brief = write_provenance(tmp_path, Filters(source, heard), {"audio": source}, Task())
    found = lines(tmp_path)
    assert [one["text"] for one in found] == heard
    assert [one["kept"] for one in found] == [True, True, False, False]
    assert [one["truth"] for one in found] == SAID
    assert [one.get("right") for one in found] == [True, False, None, False]
    assert [one["part"] for one in found] == ["good", "good", "bad", "bad"]
    assert found[0]["scores"] == {"sure": 1.0, "none": None}
    stage = brief["audio"]
    assert stage["counts"] == {"kept": 2, "sure": 2}
    assert (stage["known"], stage["right"], stage["known_kept"], stage["right_kept"]) == (
        3,
        1,
        2,
        1,
    )
    # The right one has the best score of the three that are known.
    assert stage["filters"]["sure"]["area_under_curve"] == 1
    assert stage["filters"]["none"]["area_under_curve"] == 0.5
    assert not list(tmp_path.glob(".*partial"))


def test_items_without_a_source_or_a_sound_are_told_as_well(tmp_path):
    brief = write_provenance(tmp_path, Filters(None, ["a", "b"]), {}, object())
    assert len(lines(tmp_path)) == 2
    assert brief["audio"]["right"] is None
    facts = json.loads((tmp_path / "provenance.json").read_text())
    assert "audio" not in facts["stages"]["audio"]["kept"][0]


def test_a_method_that_filters_nothing_leaves_nothing(tmp_path):
    assert write_provenance(tmp_path, object(), {}, Task()) == {}
    assert not list(tmp_path.iterdir())


def test_a_line_that_cannot_be_written_leaves_the_earlier_record(source, tmp_path, monkeypatch):
    method = Filters(source, ["one", "two", "x", "y"])
    write_provenance(tmp_path, method, {"audio": source}, Task())
    before = (tmp_path / "provenance.jsonl").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match=r"provenance\.jsonl"):
        write_provenance(tmp_path, method, {"audio": source}, Task())
    assert (tmp_path / "provenance.jsonl").read_bytes() == before
    assert not list(tmp_path.glob(".*partial"))


def test_the_page_lets_kept_and_dropped_items_be_read_and_heard(source, tmp_path):
    heard = ["one", "too", "x", "<b>noise</b>"]
    write_provenance(tmp_path, Filters(source, heard), {"audio": source}, Task())
    (tmp_path / "summary.json").write_text(json.dumps({"metric": "wer", "student": {"score": 0.2}}))
    write_report([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "What the filter kept" in page
    assert page.count("<audio controls") == 4
    assert "&lt;b&gt;noise&lt;/b&gt;" in page
    assert "<b>noise</b>" not in page
    assert "Area under the curve" in page
    address = page.split('src="data:audio/wav;base64,')[1].split('"')[0]
    with wave.open(io.BytesIO(base64.b64decode(address))) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getnframes()) == (8000, 1, 800)


def test_a_damaged_record_does_not_stop_the_page(tmp_path):
    stages = {
        "audio": {"counts": [], "filters": {"x": 3}, "kept": [{"audio": "<>", "text": None}, 4]}
    }
    (tmp_path / "provenance.json").write_text(json.dumps({"stages": stages}))
    (tmp_path / "summary.json").write_text(json.dumps({"metric": "wer"}))
    write_report([tmp_path], tmp_path / "report.html")
    assert "<audio" not in (tmp_path / "report.html").read_text()


def test_a_recording_comes_back_from_its_wave():
    samples = torch.tensor([0.5, -0.5, 1.0, 2.0, 0.0, 0.0])
    with wave.open(io.BytesIO(wave_bytes(samples, 8000))) as sound:
        assert sound.getnframes() == 4
        values = torch.frombuffer(bytearray(sound.readframes(4)), dtype=torch.int16)
    assert values.tolist() == [16384, -16384, 32767, 32767]
    # Silence is a recording, too.
    assert wave_bytes(torch.zeros(5), 8000)
