"""Speed benchmarks: all ways make the same, and the record says how fast each is."""

import json

import pytest

from vestige.bench import speed, speed_writing
from vestige.bench.speed_case import SpeedCase
from vestige.bench.speed_cases import CASES
from vestige.core.writing import Sampling
from vestige.errors import RecipeError


def test_ways_are_timed_in_turn_and_told_as_ratios(tmp_path, monkeypatch):
    calls = []
    clock = iter(range(1000))
    # Each reading is one second later; the plain way takes two more of them.
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    case = SpeedCase(
        6,
        "texts",
        {
            "vestige": lambda: calls.append("vestige"),
            "plain": lambda: (calls.append("plain"), next(clock), next(clock)),
        },
        {"batch": 6},
    )
    monkeypatch.setattr(speed, "CASES", {"made": lambda: case})
    told = []
    path = speed.run_speed("made", repeats=3, out=tmp_path, echo=told.append)
    found = json.loads(path.read_text())
    assert calls == ["vestige", "plain"] * 4
    assert found["ways"]["plain"] == {"seconds": 3.0, "texts_per_second": 2.0, "ratio": 3.0}
    assert found["ways"]["vestige"]["ratio"] == 1.0
    assert told[1] == "plain: 2.0 texts per second, 3.00 times our time"
    page = speed.speed_page({"made": found})
    assert "| plain | 2.0 | 3.00 |" in page


def test_an_unknown_case_is_told(tmp_path):
    with pytest.raises(RecipeError, match="expected one of crafting"):
        speed.run_speed("writin", repeats=1, out=tmp_path)


def test_the_plain_loop_of_crafting_makes_what_ours_makes():
    pytest.importorskip("transformers", reason="needs the extra [text]")
    case = CASES["crafting"]()
    plain, frozen = case.ways["plain"](), case.ways["plain, frozen"]()
    assert plain.shape == (case.items, case.shapes["length"], case.shapes["width"])
    # Weights that take gradients change nothing of the words.
    assert (plain - frozen).abs().max() < 1e-5


def test_all_ways_of_writing_write_the_same():
    pytest.importorskip("transformers", reason="needs the extra [text]")
    lm = speed_writing.small_writer(layers=1, width=32, vocabulary=400)
    prompts = ["a bird", "sees us", "and you", "too late"]
    greedy = Sampling(new_tokens=9, temperature=0)
    texts = speed_writing.ours(lm, prompts, greedy)
    assert len(texts) == 128 and len(set(texts)) > 2
    assert speed_writing.plain(lm, prompts, greedy, together=32) == texts
    # Drawn ones differ, but are as many and as long: 5 of 100 tokens close the quote.
    drawn = Sampling(new_tokens=40, top_p=0.9)
    ways = [
        speed_writing.ours(lm, prompts, drawn),
        speed_writing.plain(lm, prompts, drawn, together=32),
    ]
    for found in ways:
        assert len(found) == 128
        assert all('"' not in text[:-1] for text in found)
        # Where each token closes with a chance p in [0.05, 0.05 / 0.9], 87 to 90 of 100 texts end.
        assert sum(text.endswith('"') for text in found) / 128 == pytest.approx(0.885, abs=0.1)
    forced = speed_writing.plain(lm, prompts, drawn, together=32, stops=False)
    assert not any('"' in text for text in forced)


def test_the_speed_case_writes_as_many_texts_as_it_says():
    pytest.importorskip("transformers", reason="needs the extra [text]")
    case = CASES["writing"]()
    assert set(case.ways) > {"vestige", "one at a time", "32 at a time"}
    assert len(case.ways["vestige"]()) == case.items
