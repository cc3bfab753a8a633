"""Whatever a recipe, a file or an override holds: it is valid, or a RecipeError says why not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vestige.errors import RecipeError
from vestige.recipes import catalog
from vestige.recipes.files import merge, read_yaml
from vestige.recipes.loading import find_problems, load_recipe, validate
from vestige.recipes.presence import absent
from vestige.recipes.schema import Recipe

GOOD: dict[str, Any] = {
    "method": "kd",
    "teacher": "builtin:digits-convnet",
    "student": {"name": "convnet", "args": {"widths": [4, 4, 4]}},
    "sources": {"inputs": {"kind": "noise"}},
    "config": {"rounds": 1},
}
SHIPPED = {
    name: {key: value for key, value in read_yaml(name).items() if key != "presets"}
    for name in catalog.shipped()
}
WORDS = [
    *Recipe.model_fields,
    *("name", "args", "kind", "title", "rounds", "cpu", "x", "", "a.b", "factory", "weights"),
    *("widths", "inputs", "noise", "presets", "shape", "../up", "no\0name", "é", "\ud800"),
]
KEYS = st.sampled_from([*WORDS, 1, None, True, 2.5, ("a",)])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [
            *("kd", "dfad", "kd:x", "os:path", "builtin:", "builtin:digits-convnet", "recipe:"),
            *("~nobody/x", "a\0b", "x/student.json", "../..", "/", "image", "factory"),
            *("recipe:mnist-convnet", "hf:x", "timm:", "noise", "images", "!drop", "wrn-1-1"),
            *("wrn-99999999999999999999-1", "convnet", "cuda", "10" * 40, 10**400, -(2**70)),
        ]
    )
    | st.dates()
    | st.binary(max_size=4)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a mutation can strike: every key and every index at every level."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        found += paths(item, (*path, key))
    return found


def replaced(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy of `value` in which `change(parent, key)` was called at the end of `path`."""
    if isinstance(value, dict | list):
        copy = value.copy()
        if len(path) == 1:
            change(copy, path[0])
        else:
            copy[path[0]] = replaced(value[path[0]], path[1:], change)
        return copy
    return value


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A shipped recipe in which one to three things are replaced, dropped, added or renamed."""
    raw = SHIPPED[draw(st.sampled_from(sorted(SHIPPED)))]
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(paths(raw) or [("method",)]))
        kind = draw(st.sampled_from(["replace", "drop", "add", "rename", "misspell"]))
        new, word = draw(VALUES), draw(st.sampled_from(WORDS))

        def change(
            parent: Any, key: Any, kind: str = kind, new: Any = new, word: str = word
        ) -> None:
            if kind == "replace":
                parent[key] = new
            elif kind == "drop":
                del parent[key]
            elif isinstance(parent, list):
                parent.append(new)
            elif kind == "add":
                parent[word] = new
            else:
                parent[word if kind == "rename" else f"{key}"[:-1]] = parent.pop(key)

        raw = replaced(raw, where, change)
    return raw


def check_mapping(raw: dict[str, Any]) -> None:
    """Valid, and then it can be kept, read again and split into arms; or refused in words."""
    found, problems = find_problems(raw)
    if found is not None:
        assert all(isinstance(line, str) for line in absent(found))
    try:
        recipe = validate(raw)
    except RecipeError as error:
        assert problems
        assert 0 < len(str(error)) < 20_000
        return
    assert not problems
    recipe.method_config()
    for name in recipe.arms:
        recipe.arm(name).method_config()
    again = validate(yaml.safe_load(recipe.to_yaml()))
    assert again.fingerprint() == recipe.fingerprint()


def check_override(text: str) -> None:
    try:
        recipe = load_recipe("kd", overrides=[text])
    except RecipeError as error:
        assert 0 < len(str(error)) < 20_000
        return
    assert isinstance(recipe, Recipe)
    recipe.to_yaml()


def check_file(content: bytes, folder: Path) -> None:
    path = folder / "r.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(load_recipe(path), Recipe)
    except RecipeError as error:
        assert 0 < len(str(error)) < 20_000


def few(strategy: st.SearchStrategy[Any], check: Callable[..., None], count: int) -> None:
    """Run `check` on `count` examples."""

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(value: Any) -> None:
        check(value)

    run()


ANY_MAPPING = st.dictionaries(KEYS, VALUES, max_size=6)
MAPPINGS = ANY_MAPPING | ANY_MAPPING.map(lambda changes: merge(GOOD, changes))
OVERRIDES = st.builds(
    lambda key, value: f"{key}={value}",
    st.text(max_size=12)
    | st.sampled_from(
        [
            *("config.rounds", "student.args.widths", "teacher", "plugins", "arms.a.title", "seed"),
            *("trainer.threads", "input.shape", "sources.inputs.kind", "presets", "method"),
        ]
    ),
    st.text(max_size=20)
    | st.from_regex(r"[0-9:._xbe+\-]{1,12}", fullmatch=True)
    | st.from_regex(r"[\[\]{},:&*!|>'\"#%@` ab\n\t-]{1,16}", fullmatch=True)
    | VALUES.map(repr),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A shipped file with a few bytes cut out, put in or changed."""
    content = bytearray(catalog.shipped()[draw(st.sampled_from(sorted(SHIPPED)))].read_bytes())
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = start + draw(st.integers(0, 12))
        put = draw(st.binary(max_size=6) | st.sampled_from([b"\t", b"&a ", b"*a", b"<<: ", b"- ["]))
        content[start:end] = put
    return bytes(content)


def as_yaml(value: Any) -> bytes:
    return yaml.dump(value, allow_unicode=True).encode("utf8", errors="surrogatepass")


FILES = st.binary(max_size=200) | damaged() | (mutated() | MAPPINGS | VALUES).map(as_yaml)


def test_a_mutated_recipe_is_valid_or_refused():
    few(mutated(), check_mapping, 150)


def test_any_mapping_is_valid_or_refused():
    few(MAPPINGS, check_mapping, 100)


def test_any_override_is_valid_or_refused():
    few(OVERRIDES, check_override, 100)


def test_any_file_is_valid_or_refused(tmp_path: Path):
    few(FILES, lambda content: check_file(content, tmp_path), 100)


@pytest.mark.slow
def test_ten_thousand_recipes_files_and_overrides_are_valid_or_refused(tmp_path: Path):
    few(mutated(), check_mapping, 4000)
    few(MAPPINGS, check_mapping, 2000)
    few(OVERRIDES, check_override, 2000)
    few(FILES, lambda content: check_file(content, tmp_path), 2000)
