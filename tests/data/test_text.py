"""Sets of texts: which lines are whose split, and what is told of damaged ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vestige.core.texts import PAIR, to_texts
from vestige.core.types import InputSpec
from vestige.data.text import TextSet, load_texts
from vestige.errors import DataError, ShapeError


def lines(first: int, last: int, **more: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {n}", "label": n % 3, **more} for n in range(first, last)]


def write(folder: Path, **files: Sequence[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, rows in files.items():
        written = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (folder / f"{stem}.jsonl").write_text("\n".join(written) + "\n", encoding="utf8")
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESTIGE_DATA", str(tmp_path / "sets"))
    return tmp_path / "sets"


def numbers(name: str | Path, split: str) -> list[int]:
    return [int(text.rpartition(" ")[2]) for text in load_texts(str(name), split).texts]


# Which lines are whose


@pytest.mark.parametrize("stem", ["select", "val", "dev"])
def test_a_set_with_all_three_splits(root: Path, stem: str) -> None:
    write(root / "set", train=lines(0, 20), test=lines(20, 25), **{stem: lines(25, 28)})
    assert numbers("set", "train") == list(range(20))
    assert numbers("set", "test") == list(range(20, 25))
    assert numbers("set", "select") == [25, 26, 27]
    with pytest.raises(DataError, match="divided into train, select, test; name one"):
        load_texts("set", "all")


def test_select_goes_before_val_and_dev(root: Path) -> None:
    write(root / "set", train=lines(0, 3), dev=lines(3, 6), select=lines(6, 9), test=lines(9, 12))
    assert numbers("set", "select") == [6, 7, 8]


def test_without_a_select_split_the_last_tenth_of_train_is_it(root: Path) -> None:
    write(root / "set", train=lines(0, 25), test=lines(25, 30))
    assert numbers("set", "train") == list(range(23))
    assert numbers("set", "select") == [23, 24]
    write(root / "small", train=lines(0, 5), test=lines(5, 8))
    with pytest.raises(DataError, match="no texts for the 'select' split"):
        load_texts("small", "select")


def test_without_a_test_split_dev_judges_and_never_selects(root: Path) -> None:
    write(root / "set", train=lines(0, 20), dev=lines(20, 25))
    assert numbers("set", "test") == list(range(20, 25))
    assert numbers("set", "train") == list(range(18))
    assert numbers("set", "select") == [18, 19]


def test_a_set_in_one_piece_is_divided_by_content(root: Path) -> None:
    write(root / "set", all=lines(0, 1000))
    parts = {split: numbers("set", split) for split in ("train", "select", "test")}
    assert sorted(one for part in parts.values() for one in part) == list(range(1000))
    # 1,000 draws with chance 0.8 and 0.1: four deviations are 51 and 38.
    assert abs(len(parts["train"]) - 800) < 51 and abs(len(parts["test"]) - 100) < 38
    assert numbers("set", "all") == list(range(1000))
    write(root / "other", all=lines(0, 1000)[::-1])
    assert set(numbers("other", "test")) == set(parts["test"])
    # A copy of a text is in the same split as the text.
    write(root / "twice", all=lines(0, 300) * 2)
    assert not set(numbers("twice", "train")) & set(numbers("twice", "test"))


@pytest.mark.parametrize("asked", ["{}/mine.jsonl", "mine.jsonl", "./mine.jsonl"])
def test_a_file_is_one_split_and_only_judges(
    tmp_path: Path, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, mine=lines(0, 4))
    monkeypatch.chdir(tmp_path)
    found = load_texts(asked.format(tmp_path), "test")
    assert (found.name, len(found)) == ("mine", 4)
    with pytest.raises(DataError, match="what judges must not train"):
        load_texts(asked.format(tmp_path), "train")


def test_what_is_not_there_is_told_with_the_layout(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*train\.jsonl.*put train\.jsonl, test\.jsonl"):
        load_texts("nothing", "select")
    with pytest.raises(DataError, match="got no file"):
        load_texts(str(tmp_path / "x.jsonl"), "test")
    with pytest.raises(DataError, match="expected one of train, select, test, all"):
        load_texts("nothing", "dev")
    write(root / "set", train=lines(0, 9))
    with pytest.raises(DataError, match=r"test\.jsonl"):
        TextSet.find("set", "test")
    TextSet.find("set", "train")


# Texts, pairs, labels


@pytest.mark.parametrize(
    "keys", [("premise", "hypothesis"), ("sentence1", "sentence2"), ("question", "sentence")]
)
def test_pairs_are_one_text_with_a_mark_between(root: Path, keys: tuple[str, str]) -> None:
    rows = [{keys[0]: "It rains.", keys[1]: f"A{PAIR}B", "label": 1}, *lines(0, 2)]
    write(root / "set", train=rows, test=rows)
    assert load_texts("set", "test").texts == [f"It rains.{PAIR}A B", "text 0", "text 1"]


def test_names_of_labels_are_numbered_by_the_alphabet_over_all_files(root: Path) -> None:
    rows = [{"text": "a", "label": "pear"}, {"text": "b", "label": "apple"}]
    write(root / "set", train=[*rows, {"text": "c", "label": "fig"}], dev=rows, test=rows[:1])
    for split, labels in (("train", [2, 0, 1]), ("select", [2, 0]), ("test", [2])):
        found = load_texts("set", split)
        assert found.classes == ("apple", "fig", "pear")
        assert found.labels.tolist() == labels
        assert found.labels.dtype == torch.int64


def test_numbers_without_names_count_over_all_files(root: Path) -> None:
    write(root / "set", train=lines(0, 10), test=[{"text": "x", "label": 0}])
    for split in ("train", "select", "test"):
        assert load_texts("set", split).classes == ("0", "1", "2")
        assert load_texts("set", split).least_classes() == 3


def test_a_list_of_classes_names_the_numbers(root: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": "left"}]
    write(root / "set", train=rows, test=rows)
    (root / "set" / "classes.json").write_text(json.dumps(["right", "left", "up"]))
    found = load_texts("set", "test")
    assert (found.classes, found.labels.tolist()) == (("right", "left", "up"), [1, 1])


def test_classes_in_brackets_are_taken_and_numbered_as_given(root: Path) -> None:
    rows = [{"text": label, "label": label} for label in ("a", "b", "c", "b", "a")]
    write(root / "set", train=rows, dev=rows, test=rows)
    found = load_texts("set[c,b]", "test")
    assert (found.name, found.classes) == ("set[c,b]", ("c", "b"))
    assert (found.texts, found.labels.tolist()) == (["b", "c", "b"], [1, 0, 1])
    assert found.fingerprint != load_texts("set[b,c]", "test").fingerprint
    with pytest.raises(DataError, match=r"got the classes bb .*did you mean 'b'"):
        load_texts("set[bb]", "test")
    TextSet.find("set[c,b]", "test")


def test_inputs_are_rows_of_bytes_and_examples_have_their_labels(root: Path) -> None:
    write(root / "set", train=lines(0, 20), test=lines(20, 25))
    found = load_texts("set", "test")
    inputs, labels = found.examples(InputSpec.text(9))
    assert (inputs.shape, inputs.dtype) == ((5, 9), torch.uint8)
    assert to_texts(inputs) == found.texts
    assert torch.equal(labels, found.labels)
    assert to_texts(found.inputs(InputSpec.text(4))) == ["text"] * 5
    with pytest.raises(ShapeError, match=r"InputSpec\.text"):
        found.inputs(InputSpec.image(1, 4, 4))


def test_the_fingerprint_is_of_texts_labels_and_names_wherever_they_lie(
    root: Path, tmp_path: Path
) -> None:
    write(root / "set", train=lines(0, 20), test=lines(20, 26))
    kept = load_texts("set", "test").fingerprint
    write(tmp_path / "far" / "away", train=lines(0, 20), test=lines(20, 26, note="more"))
    far = load_texts(str(tmp_path / "far" / "away"), "test")
    assert (far.fingerprint, far.path) == (kept, tmp_path / "far" / "away" / "test.jsonl")
    changes = [
        lines(20, 25),
        [*lines(20, 25), {"text": "text 25", "label": 2}],
        [*lines(20, 25), {"text": "text 25!", "label": 1}],
        lines(20, 26)[::-1],
    ]
    for number, rows in enumerate(changes):
        write(tmp_path / str(number), train=lines(0, 20), test=rows)
        assert load_texts(str(tmp_path / str(number)), "test").fingerprint != kept
    (root / "set" / "classes.json").write_text('["a", "b", "c"]')
    assert load_texts("set", "test").fingerprint != kept


def test_what_no_line_is_or_no_byte_can_hold_does_no_harm(root: Path) -> None:
    rows = ["", '{"text": "caf\\u00e9 \\ud83d", "label": 0}', "   ", '{"text": "", "label": 1}\r']
    write(root / "set", train=lines(0, 20), all=rows, test=rows)
    found = load_texts("set", "test")
    assert found.texts == ["café ?", ""]
    assert to_texts(found.inputs(InputSpec.text(16))) == found.texts
    write(root / "whole", all=rows)
    assert len(load_texts("whole", "all")) == 2


# Damage


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[1, 2]",
        "3",
        '{"text": "a"}',
        '{"label": 0}',
        '{"premise": "a", "label": 0}',
        '{"text": 3, "label": 0}',
        '{"text": null, "label": 0}',
        '{"premise": "a", "hypothesis": ["b"], "label": 0}',
        '{"text": "a", "label": null}',
        '{"text": "a", "label": true}',
        '{"text": "a", "label": 0.5}',
        '{"text": "a", "label": [0]}',
        '{"text": "a", "label": 0',
        "[" * 100_000,
    ],
)
def test_a_damaged_line_is_named_by_its_number(root: Path, line: str) -> None:
    write(root / "set", train=lines(0, 20), test=['{"text": "a", "label": 0}', "", line])
    with pytest.raises(DataError, match=r"got line 3 of .*test\.jsonl"):
        load_texts("set", "test")


@pytest.mark.parametrize("label", [-1, 3, "up", 10**30])
def test_labels_that_are_no_class_are_refused(root: Path, label: object) -> None:
    write(root / "set", train=lines(0, 20), test=[{"text": "a", "label": label}])
    (root / "set" / "classes.json").write_text('["a", "b", "c"]')
    with pytest.raises(DataError, match=rf"got the label {label!r} in .* expected one of a, b, c"):
        load_texts("set", "test")


@pytest.mark.parametrize("label", [-1, 10**12])
def test_numbers_that_can_be_no_class_are_refused_without_counting_up_to_them(
    root: Path, label: int
) -> None:
    write(root / "set", train=lines(0, 20), test=[{"text": "a", "label": label}])
    with pytest.raises(DataError, match=f"got the label {label} in"):
        load_texts("set", "test")


@pytest.mark.parametrize("content", ["{}", '["a", "a"]', "not json", '"ab"'])
def test_a_damaged_list_of_classes_is_told(root: Path, content: str) -> None:
    write(root / "set", train=lines(0, 20), test=lines(0, 3))
    (root / "set" / "classes.json").write_text(content)
    with pytest.raises(DataError, match=r"classes\.json"):
        load_texts("set", "test")


def test_a_file_that_is_no_text_is_told(root: Path) -> None:
    write(root / "set", train=lines(0, 20))
    (root / "set" / "test.jsonl").write_bytes(b'{"text": "\xff", "label": 0}')
    with pytest.raises(DataError, match=r"test\.jsonl, which cannot be read"):
        load_texts("set", "test")


# The list


def test_every_set_is_listed_with_its_sizes(root: Path) -> None:
    assert TextSet.listed() == []
    write(root / "b", train=["", *lines(0, 20)], dev=lines(0, 4))
    write(root / "a", all=lines(0, 7))
    write(root / "none")
    assert TextSet.listed() == [
        ("a", str(root / "a"), {"all": 7}),
        ("b", str(root / "b"), {"train": 20, "select": 4}),
    ]


def test_the_sets_of_the_data_folder_are_as_they_are_described(data_folder: Path) -> None:
    if not (data_folder / "ag_news").is_dir():
        pytest.skip("needs ag_news in the data folder")
    found = load_texts("ag_news", "test")
    assert len(found.classes) == 4
    assert torch.bincount(found.labels).min() > 0
    assert not set(load_texts("ag_news", "train").texts) & set(found.texts)
