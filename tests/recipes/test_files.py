"""Strict YAML: what is read, what is refused with its line, and how layers merge."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vestige.errors import RecipeError
from vestige.recipes import catalog, files
from vestige.recipes.files import merge, parse, parse_override
from vestige.recipes.loading import load_recipe

# Merging


def test_mappings_merge_lists_replace_and_drop_takes_away():
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 1, "c": {"z": 1}}
    over = {"a": {"y": [3], "w": {"v": 1}}, "b": {"n": 1}, "c": "!drop", "absent": "!drop"}
    assert merge(base, over) == {"a": {"x": 1, "y": [3], "w": {"v": 1}}, "b": {"n": 1}}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 1, "c": {"z": 1}}


# --set


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1", {"a": 1}),
        ("a.b.c=1", {"a": {"b": {"c": 1}}}),
        ("a=1e-3", {"a": 1e-3}),
        ("a=-2.5E+4", {"a": -2.5e4}),
        ("a=1.5", {"a": 1.5}),
        ("a=true", {"a": True}),
        ("a=null", {"a": None}),
        ("a=", {"a": None}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ("a={x: 1, y: [z]}", {"a": {"x": 1, "y": ["z"]}}),
        ("a=b=c", {"a": "b=c"}),
        (" a.b = text ", {"a": {"b": "text"}}),
        ("a=x.safetensors", {"a": "x.safetensors"}),
        ("a=!drop", None),
        ("a='!drop'", {"a": "!drop"}),
    ],
)
def test_set_reads_a_dotted_key_and_a_yaml_value(text: str, expected: Any):
    if expected is None:
        # A tag, not text, to YAML.
        with pytest.raises(RecipeError, match="got a value of kind '!drop'"):
            parse_override(text)
    else:
        found = parse_override(text)
        assert found == expected
        assert repr(found) == repr(expected)  # 1 is not 1.0 and not True


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "=1",
        ".a=1",
        "a..b=1",
        "a.=1",
        "a=[1",
        "a={",
        "a=2020-13-45",  # PyYAML raises ValueError for an impossible date
        "a=0b_",
        "a=" + "9" * 5000,
        "a=" + "[" * 10_000,
        "a=\x00",
        "a=!!python/object:os.system {}",
        ".".join("a" * 10_000) + "=1",
    ],
)
def test_a_bad_set_is_named_not_raised_through(text: str):
    with pytest.raises(RecipeError, match="--set"):
        load_recipe("kd", overrides=[text])


# Files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds NoneType"),
        (b"# only a comment\n", "holds NoneType"),
        (b"- a\n- b\n", "holds list"),
        (b"just text", "holds str"),
        (bytes(range(256)), "is not YAML"),
        (b"\xff\xfe\x00\x01" * 10, "is not YAML"),
        (b"method: [dfad", "is not YAML"),
        (b"method: !!python/object:os.system {}", "line 1: got a value of kind"),
        (b"a: 2020-13-45", "line 1: got a value of kind 'timestamp'"),
        (b"[" * 10_000 + b"]" * 10_000, "is not YAML"),
        (b"{a: " * 10_000 + b"}" * 10_000, "is not YAML"),
        (b"a: " + b"x" * 1_100_000, "a recipe has at most 1000000"),
        (b"method: kd\npresets: [a]", "expected a mapping"),
        (b"method: kd\npresets: {cpu: [a]}", "expected a mapping"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_reason(
    content: bytes, expected: str, tmp_path: Path
):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=expected):
        load_recipe(path)


def test_values_that_are_large_or_endless_are_shown_shortened(tmp_path: Path):
    path = tmp_path / "bomb.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
    path.write_text("\n".join([*lines, "data: *a11", "seed: &loop [*loop]"]))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 5_000


@pytest.mark.parametrize("name", ["dfda", "no/such.yaml", ".", "", "x" * 5000, "a\0b"])
def test_a_recipe_that_is_not_there_is_named(name: str):
    names = ", ".join(catalog.shipped())
    with pytest.raises(RecipeError, match=f"expected a file or one of {names}"):
        load_recipe(name)


@pytest.mark.parametrize(
    ("content", "line", "expected"),
    [
        ("method: kd\ndata: a\nmethod: dfad\n", 3, "the key 'method' a second time, after line 1"),
        ('method: kd\nconfig:\n  rounds: 1\n  "rounds": 2\n', 4, "'rounds' a second time"),
        ("a: {x: 1, y: 2, x: 3}", 1, "'x' a second time"),
        ("method: kd\n1: 2\n", 2, "the key '1' of kind int; put it in quotes"),
        ("arms:\n  no: {title: t}\n", 2, "the key 'no' of kind bool; put it in quotes"),
        ("a:\n  ? [1, 2]\n  : x\n", 2, "the key a list or mapping of kind seq"),
        ("method: kd\nx: 2020-01-01\n", 2, "a value of kind 'timestamp'; put text in quotes"),
        ("x: !!binary aGVsbG8=\n", 1, "a value of kind 'binary'"),
        ("x: !!set {a, b}\n", 1, "a value of kind 'set'"),
        ("x: !own y\n", 1, "a value of kind '!own'"),
        ("a: 1\nb: &loop\n  - *loop\n", 3, "a value that holds itself"),
        ("seed: 0x" + "f" * 5000, 1, "a number of 5002 digits"),
        ("x: " + "[" * 30 + "]" * 30, 1, "more than 20 levels"),
    ],
)
def test_what_yaml_would_take_silently_is_refused_with_its_line(
    content: str, line: int, expected: str, tmp_path: Path
):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    # A value that spans lines is named by its first or by the one where it was found out.
    assert str(caught.value).startswith(f"{path}, line {line}: ") or "holds itself" in expected
    assert expected in str(caught.value)


def test_a_tab_is_named_as_such(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("method: kd\nconfig:\n\trounds: 1\n")
    with pytest.raises(RecipeError, match=r"(?s)line 3.*by spaces, not by tabs"):
        load_recipe(path)


def test_aliases_may_not_stand_for_more_than_a_recipe_holds():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
    with pytest.raises(RecipeError, match=r"line \d+: got more than 100000 values by aliases"):
        parse("\n".join(lines))
    # Merge keys multiply, too.
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 8)}]}}" for i in range(1, 9)]
    with pytest.raises(RecipeError, match="values by aliases"):
        parse("\n".join(lines))


def test_a_merged_key_may_be_overridden_and_is_no_duplicate():
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: *b, x: 4}\n"
    assert parse(text)["c"] == {"x": 4, "y": 3}
    assert parse(text) == yaml.safe_load(text)


def test_every_shipped_recipe_reads_as_plain_yaml_does():
    for path in catalog.shipped().values():
        text = path.read_text(encoding="utf8")
        assert parse(text) == yaml.safe_load(text)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "r.yaml"
    path.write_text("method: kd")

    def refuse(*arguments: Any, **given: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(RecipeError, match=r"r\.yaml cannot be read: Permission denied"):
        load_recipe(path)


def test_the_largest_recipe_is_far_above_the_shipped_ones():
    assert all(path.stat().st_size < files.LARGEST / 100 for path in catalog.shipped().values())
