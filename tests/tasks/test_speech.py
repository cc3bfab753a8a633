"""Speech is judged by the words of a corpus, with what was heard told for reading."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vestige.core.texts import to_bytes
from vestige.core.transcripts import Transcripts
from vestige.core.types import InputSpec
from vestige.errors import DataError, ShapeError
from vestige.tasks.speech import Speech

pytest.importorskip("jiwer")
pytest.importorskip("transformers")
SPEC = InputSpec.audio(0.1, 8000)
SAID = ["one two", "three", "four five six", "..."]


class Says(nn.Module):
    """Writes what it was told to, whatever it hears."""

    def __init__(self, texts: list[str], tokens: int = 7) -> None:
        super().__init__()
        self.texts, self.tokens = texts, tokens
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, waveforms: Tensor) -> Tensor:
        return torch.zeros(len(waveforms), 1, self.tokens)

    def transcribe(self, waveforms: Tensor, *, batch_size: int = 32) -> Transcripts:
        assert not self.training
        zeros = torch.zeros(len(waveforms), 1)
        return Transcripts(
            self.texts, zeros.long(), zeros, zeros, zeros[:, 0].long(), zeros[:, 0] > 0
        )


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return torch.zeros(4, 800), to_bytes(SAID, 32)


def test_rates_are_over_the_words_of_all_recordings(data):
    model = Says(["one", "three", "four five six seven", "noise"]).train()
    scores = Speech(SPEC, 7).evaluate(model, data)
    assert scores["wer"] == pytest.approx(2 / 6)
    assert 0 < scores["cer"] < 1
    assert model.training


def test_details_tell_the_worst_first_and_who_agrees(data):
    student = Says(["one two", "tree", "four", ""])
    teacher = Says(["One two!", "three", "four", ""])
    found = Speech(SPEC, 7).details(student, teacher, data)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [one["truth"] for one in found["utterances"]] == [SAID[1], SAID[2], SAID[0], SAID[3]]
    assert found["utterances"][0]["student"] == "tree"
    assert found["utterances"][0]["teacher_wer"] == 0
    assert (found["inputs"], found["words"], found["skipped"]) == (4, 6, 1)
    assert found["same_text"] == pytest.approx(3 / 4)
    assert found["student"]["exact"] == pytest.approx(1 / 3)
    alone = Speech(SPEC, 7).details(student, None, data)
    assert alone["teacher"] is None
    assert alone["same_text"] is None


@pytest.mark.parametrize(
    ("model", "told"), [(nn.Linear(1, 1), "transcribe"), (Says([], tokens=9), "expected")]
)
def test_networks_that_do_not_fit_are_refused(model: Any, told: str):
    with pytest.raises(ShapeError, match=told):
        Speech(SPEC, 7).check(model)
    Speech(SPEC, 9).check(Says([], tokens=9))


def test_examples_that_do_not_fit_are_refused(data):
    task = Speech(SPEC, 7)
    with pytest.raises(DataError, match="row of bytes"):
        task.check_examples((data[0], torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(ShapeError, match="800"):
        task.check_examples((torch.zeros(4, 801), data[1]))
    with pytest.raises(DataError, match="audio"):
        Speech(InputSpec.text(8), 7)
