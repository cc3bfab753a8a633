"""Sets of recordings: splits, options in brackets, other rates, and files that are none."""

import json
import logging
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vestige.core.texts import to_texts
from vestige.core.types import InputSpec
from vestige.data.audio import AudioSet, load_audio
from vestige.errors import DataError

pytest.importorskip("soundfile")
RATE = 8000
SPEC = InputSpec.audio(0.5, RATE)
Write = Callable[..., Path]


def save(path: Path, samples: np.ndarray, rate: int = RATE, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def tone(number: int, seconds: float = 0.1, rate: int = RATE) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * (200 + 40 * number) * time)


def make(folder: Path, count: int = 10, texts: bool = True) -> Path:
    lines = []
    for number in range(count):
        save(folder / f"{number:02d}.wav", tone(number))
        about = {"file_name": f"{number:02d}.wav", "speaker": "ab"[number % 2]}
        lines.append({**about, "take": number, **({"text": f"word{number}"} if texts else {})})
    if texts:
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path / "train", 20)
    make(tmp_path / "test", 4)
    return tmp_path


def test_recordings_and_texts_of_a_split(folder):
    found = AudioSet.open(str(folder), "test")
    waveforms, rows = found.examples(SPEC)
    assert waveforms.shape == (4, 4000)
    assert waveforms.dtype == torch.float32
    assert to_texts(rows) == ["word0", "word1", "word2", "word3"]
    expected = torch.from_numpy(tone(1)).float()
    assert torch.allclose(waveforms[1, :800], expected, atol=1e-4)
    assert not waveforms[1, 800:].any()


def test_without_select_a_tenth_of_train_is_held_back(folder):
    train, select = (load_audio(str(folder), split) for split in ("train", "select"))
    names = [{one.clips[0].path.name for one in found.utterances} for found in (train, select)]
    assert list(map(len, names)) == [18, 2]
    assert not names[0] & names[1]


def test_what_has_no_splits_is_divided_by_content(tmp_path):
    make(tmp_path / "set", 40)
    parts = {s: load_audio(str(tmp_path / "set"), s) for s in ("train", "select", "test")}
    assert sum(map(len, parts.values())) == 40
    assert len(load_audio(str(tmp_path / "set"), "all")) == 40
    assert AudioSet.undivided(str(tmp_path / "set"))
    (tmp_path / "set" / "00.wav").rename(tmp_path / "set" / "zz.wav")
    text = (tmp_path / "set" / "metadata.jsonl").read_text().replace("00.wav", "zz.wav")
    (tmp_path / "set" / "metadata.jsonl").write_text(text)
    assert {s: len(load_audio(str(tmp_path / "set"), s)) for s in parts} == {
        s: len(found) for s, found in parts.items()
    }


def test_brackets_choose_by_metadata_and_join(folder):
    chosen = load_audio(f"{folder}[speaker=b]", "test")
    assert [one.text for one in chosen.utterances] == ["word1", "word3"]
    ranged = load_audio(f"{folder}[take=1..2|0]", "test")
    assert sorted(str(one.text) for one in ranged.utterances) == ["word0", "word1", "word2"]
    joined = load_audio(f"{folder}[speaker=a|b,join=2-3]", "train")
    again = load_audio(f"{folder}[speaker=a|b,join=2-3]", "train")
    assert joined.fingerprint == again.fingerprint
    assert all(2 <= len(one.clips) <= 3 for one in joined.utterances)
    speakers = [{clip.about["speaker"] for clip in one.clips} for one in joined.utterances]
    assert all(len(one) == 1 for one in speakers)
    used = [clip.path for one in joined.utterances for clip in one.clips]
    assert len(used) == len(set(used))
    waveforms, texts = joined.read(SPEC)
    first = joined.utterances[0]
    assert texts[0] == " ".join(str(clip.text) for clip in first.clips)
    silence = waveforms[0, 800 : 800 + round(first.gaps[0] * RATE)]
    assert 400 <= len(silence) <= 1200
    assert not silence.any()
    assert len(load_audio(f"{folder}[join=1-1x3]", "test")) == 12


@pytest.mark.parametrize("bad", ["[speaker=c]", "[join=3-1]", "[join=x]", "[speaker]", "[]"])
def test_brackets_that_mean_nothing_are_refused(folder, bad):
    with pytest.raises(DataError):
        load_audio(f"{folder}{bad}", "test")


def test_another_rate_is_resampled_and_said(folder, caplog):
    pytest.importorskip("scipy")
    save(folder / "test" / "00.wav", tone(0, rate=16_000), rate=16_000)
    with caplog.at_level(logging.INFO):
        waveforms, _ = load_audio(str(folder), "test").examples(SPEC)
    assert "1 files have another sample rate and are resampled to 8000 Hz" in caplog.text
    # Away from the ends, where the filter has nothing to look at.
    assert torch.allclose(
        waveforms[0, 100:700], torch.from_numpy(tone(0)[100:700]).float(), atol=2e-3
    )


def test_corrupt_and_empty_files_are_skipped_and_counted(folder, caplog):
    (folder / "test" / "00.wav").write_bytes(b"RIFF nothing")
    save(folder / "test" / "01.wav", np.zeros(0))
    (folder / "test" / "02.wav").write_bytes(b"")
    found = load_audio(str(folder), "test")
    _, rows = found.examples(SPEC)
    assert to_texts(rows) == ["word3"]
    assert found.notes.counts()["skipped"] == 3
    assert "3 files are corrupt or hold no sample and are skipped (00.wav" in caplog.text


def test_where_nothing_can_be_read_it_is_an_error(folder):
    for path in (folder / "test").glob("*.wav"):
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="4 of them corrupt or empty"):
        load_audio(str(folder), "test").inputs(SPEC)


def test_stereo_is_averaged(folder):
    left, right = tone(0), tone(3)
    save(folder / "test" / "00.wav", np.stack([left, right], 1).reshape(-1), channels=2)
    waveforms, _ = load_audio(str(folder), "test").examples(SPEC)
    mean = torch.from_numpy((left + right) / 2).float()
    assert torch.allclose(waveforms[0, :800], mean, atol=1e-4)


def test_what_is_too_long_is_cut_or_left_out(folder, tmp_path, caplog):
    save(folder / "test" / "00.wav", tone(0, seconds=0.6))
    _, rows = load_audio(str(folder), "test").examples(SPEC)
    assert len(rows) == 3
    assert "left out" in caplog.text
    make(tmp_path / "plain", 2, texts=False)
    save(tmp_path / "plain" / "00.wav", tone(0, seconds=0.6))
    waveforms, texts = load_audio(str(tmp_path / "plain"), "all").read(SPEC)
    assert texts == [None, None]
    assert waveforms.shape == (2, 4000)
    assert bool(waveforms[0, -100:].any())


def test_recordings_without_texts_cannot_judge(tmp_path):
    make(tmp_path / "plain", 2, texts=False)
    with pytest.raises(DataError, match="without a transcript"):
        load_audio(str(tmp_path / "plain"), "all").examples(SPEC)


def test_metadata_must_fit_the_files(folder):
    (folder / "test" / "00.wav").unlink()
    with pytest.raises(DataError, match="not there"):
        load_audio(str(folder), "test")
    (folder / "test" / "metadata.jsonl").write_text("{")
    with pytest.raises(DataError, match="line 1"):
        load_audio(str(folder), "test")


def test_a_missing_set_says_where_files_go(tmp_path):
    with pytest.raises(DataError, match=r"metadata\.jsonl"):
        AudioSet.find(str(tmp_path / "nothing"), "train")


def test_plain_wave_files_need_no_package(folder, monkeypatch):
    import sys

    expected, _ = load_audio(str(folder), "test").examples(SPEC)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    found, _ = load_audio(str(folder), "test").examples(SPEC)
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_digits_are_there(data_folder):
    if not (data_folder / "fsdd").is_dir():
        pytest.skip("needs fsdd in the data folder")
    assert len(load_audio("fsdd", "test")) == 300
    assert len(load_audio("fsdd", "train")) + len(load_audio("fsdd", "select")) == 2700
