"""Folders of `datasets.save_to_disk`, written here as that package writes them."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vestige.core.types import InputSpec
from vestige.data.unlabelled.arrow import ArrowImages, is_saved_dataset
from vestige.data.unlabelled.decoding import in_size
from vestige.errors import DataError, MissingExtraError

SPEC = InputSpec.image(3, 6, 5)
IMAGE, LABEL = {"_type": "Image"}, {"_type": "ClassLabel", "names": ["a", "b"]}


def picture(seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (7, 8, 3), dtype=np.uint8)


def encoded(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(seed)).save(stream, format="PNG")
    return stream.getvalue()


def card(folder: Path, features: dict[str, Any], files: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    state = {"_data_files": [{"filename": name} for name in files], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def save(folder: Path, pictures: list[bytes | None], shards: int = 2, **more: Any) -> Path:
    """What `Dataset.save_to_disk(folder, num_shards=shards)` leaves, labels included."""
    pa = pytest.importorskip("pyarrow")
    names = [f"data-{n:05d}-of-{shards:05d}.arrow" for n in range(shards)]
    card(folder, {"label": LABEL, "image": IMAGE, **more}, names)
    for number, rows in enumerate(np.array_split(np.arange(len(pictures)), shards)):
        columns = {
            "label": pa.array([row % 2 for row in rows]),
            "image": pa.array([{"bytes": pictures[row], "path": None} for row in rows]),
            **{name: pa.array([{"bytes": encoded(99), "path": None}] * len(rows)) for name in more},
        }
        table = pa.table(columns)
        path = str(folder / names[number])
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return folder


def read(found: ArrowImages, rows: list[int] | None = None) -> tuple[np.ndarray, list[str]]:
    blocks = list(found.blocks(SPEC, np.array(rows or range(len(found)))))
    return (
        np.concatenate([block.images for block in blocks]),
        [name for block in blocks for name in block.skipped],
    )


def test_pictures_of_all_shards_are_rows(tmp_path: Path) -> None:
    folder = save(tmp_path / "web", [encoded(seed) for seed in range(7)], shards=3)
    assert is_saved_dataset(folder)
    found = ArrowImages(folder, "web")
    assert len(found) == 7 and found.column == "image"
    images, skipped = read(found, [0, 4, 6])
    expected = [in_size(picture(seed)[None], SPEC).images[0] for seed in (0, 4, 6)]
    assert np.array_equal(images, expected) and skipped == []


def test_a_fingerprint_is_of_the_pictures_alone(tmp_path: Path) -> None:
    pictures: list[bytes | None] = [encoded(seed) for seed in range(4)]
    one = ArrowImages(save(tmp_path / "one", pictures, shards=1), "one")
    two = ArrowImages(save(tmp_path / "two", pictures, shards=2), "two")
    other = ArrowImages(save(tmp_path / "other", [*pictures[:3], encoded(9)]), "other")
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_rows_without_a_picture_are_left_out(tmp_path: Path) -> None:
    folder = save(tmp_path / "web", [encoded(0), None, b"torn", encoded(3)])
    images, skipped = read(ArrowImages(folder, "web"))
    assert len(images) == 2
    assert [one.partition(":")[0] for one in skipped] == ["row 1", "row 2"]


def test_splits_go_by_their_names(tmp_path: Path) -> None:
    root = tmp_path / "web"
    save(root / "train", [encoded(seed) for seed in range(5)])
    save(root / "validation", [encoded(seed) for seed in range(3)])
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    assert is_saved_dataset(root)
    assert len(ArrowImages(root, "web")) == 5
    assert len(ArrowImages(root, "web", split="select")) == 3
    with pytest.raises(DataError, match=r"got split 'test' of .*, expected one of train, valid"):
        ArrowImages(root, "web", split="test")
    with pytest.raises(DataError, match="has no splits; leave the split out"):
        ArrowImages(root / "train", "web", split="test")


def test_one_of_several_columns_of_pictures_is_to_be_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "web", [encoded(seed) for seed in range(4)], mask=IMAGE)
    with pytest.raises(DataError, match="whose pictures are in image, mask; name the one"):
        ArrowImages(folder, "web")
    assert len(ArrowImages(folder, "web", column="mask")) == 4
    with pytest.raises(DataError, match=r"got column 'photo' for .*columns are label, image, mask"):
        ArrowImages(folder, "web", column="photo")


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "web", [encoded(seed) for seed in range(4)], shards=1)
    shard = folder / "data-00000-of-00001.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:40])
    with pytest.raises(DataError, match="arrow, which cannot be read"):
        ArrowImages(folder, "web")
    shard.unlink()
    with pytest.raises(DataError, match="arrow, which cannot be read"):
        ArrowImages(folder, "web")
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state.json, which cannot be read"):
        ArrowImages(folder, "web")


def test_a_missing_package_is_asked_for_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    folder = card(tmp_path / "web", {"image": IMAGE}, ["data-00000-of-00001.arrow"])
    with pytest.raises(MissingExtraError, match=r"needs pyarrow; pip install 'vestige\[arrow\]'"):
        ArrowImages(folder, "web")
