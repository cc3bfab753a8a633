"""Recordings of a recipe: parts that remember themselves, and transcripts row by row."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from vestige.core.rows import KnowsParts, KnowsTexts, RowSource
from vestige.core.texts import to_texts
from vestige.core.types import InputSpec
from vestige.errors import DataError
from vestige.recipes.schema import SourceConfig
from vestige.recipes.sources import Ledger, build_source
from vestige.recipes.unlabelled_audio import open_audio
from vestige.sources.audio import AudioSource

SPEC = InputSpec.audio(0.1, 8000)


def make(folder: Path, count: int, texts: bool) -> str:
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        samples = np.sin(np.arange(700) / (3 + number)) * 0.5
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes((samples * 32767).astype("<i2").tobytes())
        lines.append(json.dumps({"file_name": f"{number}.wav", "text": f"w{number}"}))
    if texts:
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture
def heap(tmp_path: Path) -> SourceConfig:
    known, plain = make(tmp_path / "known", 6, True), make(tmp_path / "plain", 4, False)
    return SourceConfig.model_validate(
        {
            "kind": "heap",
            "origin": "unlabelled",
            "parts": {
                "clean": {"data": known, "wanted": True},
                "turned": {"data": known, "count": 3, "shift": ["reversed"], "wanted": False},
                "plain": {"data": plain, "wanted": None},
            },
        }
    )


def test_rows_know_their_part_and_their_text(heap):
    opened = open_audio("audio", heap, SPEC, 0)
    source = opened.source
    assert isinstance(source, AudioSource)
    assert isinstance(source, RowSource)
    assert isinstance(source, KnowsParts)
    assert isinstance(source, KnowsTexts)
    rows = torch.arange(len(source))
    parts = [list(source.parts)[one] for one in source.part_of(rows).tolist()]
    assert {name: parts.count(name) for name in source.parts} == {
        "clean": 6,
        "turned": 3,
        "plain": 4,
    }
    told = source.texts_of(rows)
    for part, text, name in zip(parts, told, source.ids, strict=True):
        expected = {"clean": f"w{name[0]}", "turned": "", "plain": None}[part]
        assert text == expected
    assert parts != sorted(parts, key=list(source.parts).index)
    assert {one.name for one in opened.read} == {
        "audio/clean: known",
        "audio/turned: known",
        "audio/plain: plain",
    }


def test_the_seed_decides_the_rows(heap):
    def rows(seed: int) -> torch.Tensor:
        source = open_audio("audio", heap, SPEC, seed).source
        return source.rows(torch.arange(13))

    assert torch.equal(rows(0), rows(0))
    assert not torch.equal(rows(0), rows(1))


def test_recordings_are_kept_to_the_last_bit(tmp_path):
    config = SourceConfig(kind="folder", data=make(tmp_path / "a", 2, False), origin="unlabelled")
    source = open_audio("audio", config, SPEC, 0).source
    with wave.open(str(tmp_path / "a" / "1.wav")) as file:
        stored = np.frombuffer(file.readframes(700), dtype="<i2")
    expected = torch.from_numpy(stored.astype("float32") / 32768)
    assert torch.equal(source.rows(torch.tensor([1]))[0, :700], expected)
    drawn = source.draw(5, torch.Generator().manual_seed(0))
    assert drawn.shape == (5, 800)


def test_transcripts_stand_row_by_row_and_count_as_real(heap, tmp_path):
    without = {name: part for name, part in heap.parts.items() if name != "plain"}
    heap = heap.model_copy(update={"parts": without})
    ledger = Ledger("me")
    texts = heap.model_copy(update={"column": "text"})
    audio = build_source("audio", heap, SPEC, 0, torch.device("cpu"), ledger)
    truth = build_source("transcripts", texts, SPEC, 0, torch.device("cpu"), ledger)
    assert isinstance(audio, AudioSource)
    rows = truth.rows(torch.arange(9))  # type: ignore[attr-defined]
    assert to_texts(rows) == audio.texts_of(torch.arange(9))
    assert truth.origin == "real"
    assert [one.origin for one in ledger.records] == ["unlabelled"] * 2 + ["real"] * 2


def test_transcripts_that_nobody_wrote_cannot_be_asked_for(heap):
    with pytest.raises(DataError, match="without a transcript"):
        open_audio("transcripts", heap.model_copy(update={"column": "text"}), SPEC, 0)
    with pytest.raises(DataError, match="'label'"):
        open_audio("audio", heap.model_copy(update={"column": "label"}), SPEC, 0)


def test_more_than_there_are_cannot_be_asked_for(heap):
    part = heap.parts["clean"].model_copy(update={"count": 7})
    with pytest.raises(DataError, match="count: 7"):
        open_audio("audio", heap.model_copy(update={"parts": {"clean": part}}), SPEC, 0)


def test_a_shift_of_images_is_refused(heap):
    part = heap.parts["clean"].model_copy(update={"shift": ("rotate",)})
    with pytest.raises(DataError, match="rotate"):
        open_audio("audio", heap.model_copy(update={"parts": {"clean": part}}), SPEC, 0)
