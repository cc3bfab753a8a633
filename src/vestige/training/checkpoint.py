"""Checkpoints: one self-verifying safetensors file each, append-only shards beside them.

A file is named after the digest of its contents, so a truncated or altered one is recognised
without a second file that could itself be lost; then the one before it is used.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vestige.core.protocols import Sharded
from vestige.errors import CheckpointError
from vestige.training.files import sha256, tensors_to_bytes, write_bytes

logger = logging.getLogger(__name__)

_NAME = re.compile(r"^(\d{8})-([0-9a-f]{16})\.safetensors$")
_KEPT = 2


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A JSON value that stands for `value`; tensors go to `tensors` under running numbers."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value
        return {"$": "tensor", "key": key}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key != "$" for key in value):
            return {key: encode(item, tensors) for key, item in value.items()}
        return {
            "$": "items",
            "items": [[encode(k, tensors), encode(v, tensors)] for k, v in value.items()],
        }
    if isinstance(value, tuple):
        return {"$": "tuple", "items": [encode(item, tensors) for item in value]}
    if isinstance(value, list):
        return [encode(item, tensors) for item in value]
    if type(value).__module__ == "numpy":
        import torch

        if getattr(value, "ndim", 0) == 0:
            return value.item()
        # torch has few operations on unsigned 32-bit integers but stores them exactly.
        return {"$": "numpy", "array": encode(torch.from_numpy(value.copy()), tensors)}
    raise CheckpointError(
        f"got a {type(value).__name__} in a state, expected tensors, numbers, strings, None, "
        "lists, tuples or mappings of these; convert it in state_dict()"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value.get("$"):
        case None:
            return {key: decode(item, tensors) for key, item in value.items()}
        case "tensor":
            return tensors[value["key"]]
        case "tuple":
            return tuple(decode(item, tensors) for item in value["items"])
        case "items":
            return {decode(k, tensors): decode(v, tensors) for k, v in value["items"]}
        case "numpy":
            return decode(value["array"], tensors).numpy()
    raise CheckpointError(f"got the mark {value['$']!r} in a checkpoint; it is of a newer version")


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, number: int, state: Mapping[str, Any], growing: Mapping[str, Sharded]) -> Path:
        """Write a checkpoint, then drop all but the last two.

        Args:
            number: rises from one checkpoint to the next.
            state: nested tensors, numbers, strings, lists, tuples and mappings.
            growing: parts that only grow; shards already on disk are not written again.
        """
        manifest = {name: self._save_shards(name, part) for name, part in growing.items()}
        tensors: dict[str, Tensor] = {}
        tree = encode({**state, "number": number, "shards": manifest}, tensors)
        data = tensors_to_bytes(tensors, {"tree": json.dumps(tree)})
        path = self.folder / f"{number:08d}-{sha256(data)[:16]}.safetensors"
        write_bytes(path, data)
        for _, old in self._files()[:-_KEPT]:
            old.unlink(missing_ok=True)
        return path

    def load(self) -> dict[str, Any] | None:
        """The newest sound checkpoint, or None if there is none.

        Damaged ones that are newer are dropped, and so are shards that it does not list: they were
        written by a round that will be repeated.

        Raises:
            CheckpointError: there are checkpoints but none is sound, or one cannot be read at all:
                that may pass, so nothing is dropped.
        """
        files = self._files()
        damaged: list[Path] = []
        for _, path in reversed(files):
            state = self._read(path)
            if state is not None:
                self._drop_shards(
                    keep={name for names in state["shards"].values() for name in names}
                )
                # Or it would take the place of a sound one among those that are kept.
                for useless in damaged:
                    useless.unlink()
                return state
            logger.warning("checkpoint %s is damaged; the one before it is used", path.name)
            damaged.append(path)
        if files:
            raise CheckpointError(
                f"got {len(files)} checkpoints in {self.folder}, expected a sound one, all are "
                "damaged; start again in a new folder"
            )
        return None

    def shards(self, names: list[str]) -> Iterator[Mapping[str, Tensor]]:
        """The shards of a manifest, in order.

        Raises:
            CheckpointError: one is missing or damaged.
        """
        from safetensors.torch import load

        for name in names:
            path = self.folder / "shards" / name
            data = _bytes_of(path) if path.is_file() else b""
            if sha256(data)[:16] != path.stem.rsplit("-", 1)[-1]:
                raise CheckpointError(
                    f"shard {path} is missing or damaged; restore it or start without --resume"
                )
            yield load(data)

    def clear(self) -> None:
        """Drop everything; a run that starts anew must not find an older one's state."""
        for _, path in self._files():
            path.unlink()
        self._drop_shards(keep=set())

    def _drop_shards(self, keep: set[str]) -> None:
        for path in (self.folder / "shards").glob("*.safetensors"):
            if path.name not in keep:
                path.unlink()

    def _files(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        found = [(_NAME.match(path.name), path) for path in self.folder.iterdir()]
        return sorted((int(match[1]), path) for match, path in found if match)

    def _read(self, path: Path) -> dict[str, Any] | None:
        match = _NAME.match(path.name)
        data = _bytes_of(path)
        if match is None or sha256(data)[:16] != match[2]:
            return None
        state = _state_of(data)
        # Under another number it would take the place of a newer one.
        return state if state is not None and state["number"] == int(match[1]) else None

    def _save_shards(self, name: str, part: Sharded) -> list[str]:
        folder = self.folder / "shards"
        known = {
            path.name.rsplit("-", 1)[0]: path.name for path in folder.glob(f"{name}-*.safetensors")
        }
        manifest = []
        for index in range(part.shard_count()):
            stem = f"{name}-{index:06d}"
            if stem not in known:
                data = tensors_to_bytes(part.shard(index))
                known[stem] = f"{stem}-{sha256(data)[:16]}.safetensors"
                write_bytes(folder / known[stem], data)
            manifest.append(known[stem])
        return manifest


def _state_of(data: bytes) -> dict[str, Any] | None:
    """The state in a file of the right digest, or None for a file that is none of ours.

    Raises:
        CheckpointError: it is of a newer version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        # The header is a little-endian length followed by JSON; `load` does not hand it out.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        state = decode(json.loads(header["__metadata__"]["tree"]), tensors)
        shards = state["shards"]
        whole = all(isinstance(name, str) for names in shards.values() for name in names)
    except CheckpointError:
        raise
    # A digest that fits a foreign file was made on purpose, so it may hold anything.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError):
        return None
    return state if isinstance(state, dict) and whole and "number" in state else None


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error.strerror}), expected a readable file; see "
            "to its permissions and its disk, then use --resume again"
        ) from error
