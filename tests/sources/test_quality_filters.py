"""Cleaning rules and scores of pseudo-labels on cases that are known by hand."""

import math

import pytest
import torch

from vestige.core.filtering import area_under_curve
from vestige.core.transcripts import Transcripts, normalizer
from vestige.sources.audio import AudioSource
from vestige.sources.pseudo_labels import PseudoLabels
from vestige.sources.quality_filters import (
    LOOP_RATIO,
    Confidence,
    Entropy,
    Evidence,
    Proxy,
    Repetition,
    cleaning_reason,
    compression_ratio,
)

pytest.importorskip("jiwer")
LOOP = "thank you so much " * 30


def transcripts(
    texts: list[str], log_probs: list[list[float]], entropies: float = 0.0
) -> Transcripts:
    values = torch.tensor(log_probs)
    written = (values != 0).sum(1)
    return Transcripts(
        texts,
        torch.zeros(len(texts), values.shape[1], dtype=torch.int64),
        values,
        torch.full_like(values, entropies) * (values != 0),
        written,
        torch.ones(len(texts), dtype=torch.bool),
    )


def evidence(heard: Transcripts, proxy: list[str] | None = None) -> Evidence:
    rows = len(heard.texts)
    return Evidence(
        heard,
        AudioSource(torch.zeros(rows, 8), 8000, origin="unlabelled", name="a"),
        8000,
        normalizer("none"),
        torch.Generator(),
        proxy=None if proxy is None else transcripts(proxy, [[-1.0]] * rows),
    )


@pytest.mark.parametrize(
    ("text", "ended", "reason"),
    [
        ("hello", True, ""),
        ("  ", True, "empty"),
        ("hello", False, "too long"),
        ("HELLO THERE", True, "all upper case"),
        ("مرحبا", True, ""),
        ("123", True, ""),
        (LOOP, True, "repetition"),
    ],
)
def test_reasons_to_drop_whatever_the_score(text, ended, reason):
    found = cleaning_reason(text, ended, drop_upper_case=True, most_compression=LOOP_RATIO)
    assert found == reason


def test_rules_can_be_switched_off():
    assert not cleaning_reason("HELLO", True, drop_upper_case=False, most_compression=None)
    assert not cleaning_reason(LOOP, True, drop_upper_case=True, most_compression=None)


def test_a_loop_compresses_well():
    assert compression_ratio(LOOP) > LOOP_RATIO > compression_ratio("the quick brown fox")
    assert compression_ratio("") == 0
    heard = transcripts([LOOP, "one"], [[-1.0]] * 2)
    assert Repetition().scores(evidence(heard)).argmax() == 0


def test_confidence_is_the_geometric_mean_over_written_tokens():
    heard = transcripts(["a", "b"], [[math.log(0.5), math.log(0.125)], [math.log(0.9), 0.0]])
    assert Confidence().scores(evidence(heard)).tolist() == pytest.approx([0.25, 0.9], rel=1e-6)


def test_entropy_is_a_mean_over_written_tokens():
    heard = transcripts(["a", "b"], [[-1.0, -1.0], [-1.0, 0.0]], entropies=math.log(7))
    assert Entropy().scores(evidence(heard)).tolist() == pytest.approx([math.log(7)] * 2)


def test_what_was_not_written_has_no_score():
    heard = transcripts(["", "b"], [[0.0], [-1.0]])
    assert Confidence().scores(evidence(heard)).isnan().tolist() == [True, False]


def test_agreement_is_wer_with_the_other_as_reference():
    heard = transcripts(["one two", "one two", "one"], [[-1.0]] * 3)
    scores = Proxy().scores(evidence(heard, ["one two", "one", ""]))
    assert scores[:2].tolist() == [0.0, 1.0]
    assert bool(scores[2].isnan())


def test_the_curve_knows_the_direction_of_a_score():
    good = torch.tensor([True, False, True, False])
    scores = torch.tensor([1.0, 3.0, 2.0, 4.0], dtype=torch.float64)
    assert area_under_curve(scores, good, "low") == 1
    assert area_under_curve(scores, good, "high") == 0
    assert area_under_curve(torch.ones(4), good, "low") == 0.5


def test_shards_come_back_as_they_were():
    store, again = PseudoLabels(), PseudoLabels()
    store.add(transcripts(["one", "zwölf"], [[-1.0, -2.0], [-0.5, 0.0]]))
    store.add(transcripts([""], [[0.0, 0.0]]))
    again.load_shards([store.shard(index) for index in range(store.shard_count())])
    assert again.all().texts == ["one", "zwölf", ""]
    assert torch.equal(again.all().log_probs, store.all().log_probs)
    assert len(again) == 3
