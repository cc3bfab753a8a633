"""What is wrong with a source of a recipe, found without opening anything."""

from collections.abc import Iterator
from typing import Any

from vestige.data.unlabelled.audio_shifts import AUDIO_SHIFTS
from vestige.data.unlabelled.made_up import MADE_UP
from vestige.data.unlabelled.shifts import SHIFTS, unknown_shifts
from vestige.recipes.files import near
from vestige.recipes.schema import PartConfig, Recipe, SourceConfig
from vestige.recipes.tasks import CLASSIFICATION

_MOST_PARTS = 255
# Keys that only these kinds read; given elsewhere they would be ignored.
_OF = {
    "column": ("folder", "heap"),
    "count": ("folder",),
    "parts": ("heap",),
    "partition": ("clients",),
    "test_each": ("clients",),
}
_NEEDED = {
    "images": "images need the name or folder of a set",
    "clients": "clients need the name or folder of a set that is dealt out to them",
    "folder": "a folder needs its path, that of a file, or the name of a set",
    "pool": "a pool needs its folder, or that of its run",
}


def source_problems(where: str, source: SourceConfig) -> Iterator[str]:
    """One line for each mistake in a source that stands at `where`."""
    if source.kind in _NEEDED and source.data is None:
        yield f"{where}.data: {_NEEDED[source.kind]}"
    if source.kind == "factory" and source.factory is None:
        yield f"{where}.factory: is missing; 'package.module:callable'"
    if source.kind == "images" and source.split == "all":
        yield f"{where}.split: got 'all', expected train, select or test of images; take 'folder'"
    for key, kinds in _OF.items():
        given: Any = getattr(source, key)
        if given not in (None, {}) and source.kind not in kinds:
            yield (
                f"{where}.{key}: means something for kind {' and '.join(map(repr, kinds))} only, "
                f"got kind {source.kind!r}; leave it out"
            )
    if source.kind != "heap":
        return
    if source.data is not None:
        yield f"{where}.data: a heap has 'parts', each with its own data; move it there"
    if not 1 <= len(source.parts) <= _MOST_PARTS:
        yield (
            f"{where}.parts: got {len(source.parts)} parts, expected 1 to {_MOST_PARTS}; for "
            "example {photos: {data: FOLDER, wanted: true}, junk: {data: noise, count: 1000}}"
        )
    for name, part in source.parts.items():
        yield from _part_problems(f"{where}.parts.{name}", part)


def judging_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the distortions under which a recipe judges."""
    for name in unknown_shifts(recipe.data_shift):
        yield f"data_shift: got {name!r}{near(name, list(SHIFTS))}"
    if recipe.data_shift and recipe.data is None:
        yield "data_shift: there is no data to judge on; name a set as data, or leave it out"
    kind = "image" if recipe.input is None else recipe.input.kind
    if recipe.data_shift and (kind != "image" or recipe.task != CLASSIFICATION):
        yield (
            f"data_shift: got {kind} inputs and the task {recipe.task!r}, expected images with one "
            "label each; leave it out"
        )


def _part_problems(where: str, part: PartConfig) -> Iterator[str]:
    # Which of the two are meant is known once the inputs are: the other ones are refused then.
    for name in unknown_shifts(part.shift):
        if name not in AUDIO_SHIFTS:
            yield f"{where}.shift: got {name!r}{near(name, [*SHIFTS, *AUDIO_SHIFTS])}"
    if part.data not in MADE_UP:
        return
    if part.count is None:
        yield f"{where}.count: {part.data!r} is made up, so say how many; give a number"
    for key in ("split", "column"):
        if getattr(part, key) is not None:
            yield f"{where}.{key}: {part.data!r} is made up and has none; leave it out"
