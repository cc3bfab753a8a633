"""Images that somebody handed in, kept as bytes: in memory, on a GPU, or in a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vestige.core.types import InputSpec
from vestige.errors import DataError
from vestige.sources._rows import FileRows
from vestige.sources.images import ORIGINS

# Beyond, rows stay in their file or array and are sent to the GPU as they are drawn.
DEVICE_LIMIT = 8 * 2**30
# Beyond, rows stay in their file and are read from there as they are drawn.
MEMORY_LIMIT = 64 * 2**20


class StoredImages:
    """Rows of uint8 images, drawn uniformly with replacement and normalised as they are drawn.

    A `core.rows.RowSource`. Example:

        >>> import numpy, torch, vestige
        >>> spec = vestige.InputSpec.image(3, 32, 32, mean=[0.5] * 3, std=[0.25] * 3)
        >>> web = numpy.zeros((1000, 32, 32, 3), dtype="uint8")
        >>> source = StoredImages(web, spec, origin="foreign", name="web")
        >>> source.draw(8, torch.Generator().manual_seed(0)).shape
        torch.Size([8, 3, 32, 32])

    Args:
        images: (N, H, W, C), or (N, H, W) for one channel, uint8 in the size of `spec`; or the path
            of an .npy file that holds as much; beyond 64 MiB only what is drawn is read from it,
            at constant memory.
        spec: of the teacher that is to see them.
        origin: "foreign" (of something else), "unlabelled", "client-private" or "real" (the
            teacher's own data, for the reference arm); it ends up in the run record.
        name: what is shown to the user.
        device: where rows lie if that is a GPU and they are at most 8 GiB; drawing them then waits
            for nothing.
        hashes: (N,) uint64, of each image's contents, for who looks for images that are elsewhere
            as well; None where nobody made them.
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | str | Path,
        spec: InputSpec,
        *,
        origin: str,
        name: str,
        device: torch.device | str = "cpu",
        hashes: NDArray[np.uint64] | None = None,
    ) -> None:
        if origin not in ORIGINS:
            raise DataError(
                f"got origin '{origin}' for '{name}', expected one of {', '.join(ORIGINS)}; "
                "declare where the images come from"
            )
        self.origin, self.name, self.spec, self.hashes = origin, name, spec, hashes
        self.paths: tuple[Path, ...] = ()
        self._file: FileRows | None = None
        if isinstance(images, str | Path):
            self.paths = (Path(images),)
            images = _mapped(Path(images))
            self._file = FileRows(
                self.paths[0],
                images.shape[1:],
                torch.uint8,
                offset=getattr(images, "offset", 0),
                count=len(images),
            )
        _check(images, spec, name)
        self._count = len(images)
        self._array: NDArray[np.uint8] | None = None if self._file else images
        self._tensor: Tensor | None = None
        # What is an array already is in memory.
        most = MEMORY_LIMIT if self._file else 0
        if torch.device(device).type != "cpu":
            most = DEVICE_LIMIT
        if images.nbytes <= most:
            # A copy, since torch cannot wrap what is read-only.
            self._tensor = torch.from_numpy(np.array(images)).to(device)

    def __len__(self) -> int:
        return self._count

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: rows never change, and a million of them are not copied for a rehearsal."""
        return self

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """`count` inputs (count, C, H, W), on the device of `rng`; no gradient."""
        return self.rows(torch.randint(len(self), (count,), generator=rng, device=rng.device))

    def rows(self, index: Tensor) -> Tensor:
        """The inputs (B, C, H, W) with the numbers `index` (B,), on the device of `index`.

        float32, normalised with the statistics of the spec.
        """
        stored = self._stored(index).to(index.device)
        stored = stored.unsqueeze(1) if stored.dim() == 3 else stored.permute(0, 3, 1, 2)
        # In place: each new tensor of a batch would cost as much as the arithmetic.
        images = stored.contiguous().float().div_(255)
        if self.spec.mean:
            mean, std = (images.new_tensor(one) for one in (self.spec.mean, self.spec.std))
            images.sub_(mean.view(1, -1, 1, 1)).div_(std.view(1, -1, 1, 1))
        return images

    def _stored(self, index: Tensor) -> Tensor:
        if self._tensor is not None:
            return self._tensor[index.to(self._tensor.device)]
        if self._file is not None:
            return self._file.at(index)
        if self._array is None:
            raise DataError(f"got no rows in '{self.name}'")
        return torch.from_numpy(self._array[index.cpu().numpy()])


class StoredHeap(StoredImages):
    """Images from several parts in one heap; a `core.rows.KnowsParts`, for reports only.

    Args:
        images: as for `StoredImages`.
        spec: likewise.
        origin: likewise.
        name: likewise.
        parts: names of the parts, each with whether its images are of the teacher's classes; None
            where nobody knows.
        part_index: (N,) of each row, the position of its part in `parts`.
        device: likewise.
        hashes: likewise.
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | str | Path,
        spec: InputSpec,
        *,
        origin: str,
        name: str,
        parts: Mapping[str, bool | None],
        part_index: NDArray[Any] | Sequence[int],
        device: torch.device | str = "cpu",
        hashes: NDArray[np.uint64] | None = None,
    ) -> None:
        super().__init__(images, spec, origin=origin, name=name, device=device, hashes=hashes)
        self.parts = dict(parts)
        self._part_index = torch.tensor(np.asarray(part_index), dtype=torch.int64)
        if self._part_index.shape != (len(self),):
            raise DataError(
                f"got the parts of {tuple(self._part_index.shape)} rows for {len(self)} images in "
                f"'{name}', expected one for each"
            )

    def part_of(self, index: Tensor) -> Tensor:
        """Which part, by its position in `parts`, each row (B,) came from; (B,) int64."""
        return self._part_index[index.cpu()].to(index.device)


def _mapped(path: Path) -> NDArray[np.uint8]:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"got {path}, which cannot be read ({error}), expected an .npy file of uint8 images; "
            "write it with numpy.save"
        ) from error
    if not isinstance(found, np.ndarray) or not found.flags.c_contiguous:
        raise DataError(
            f"got {path}, which holds no array in C order, expected one; write it with "
            "numpy.save(path, numpy.ascontiguousarray(images))"
        )
    return found


def _check(images: NDArray[Any], spec: InputSpec, name: str) -> None:
    channels, height, width = spec.shape if len(spec.shape) == 3 else (0, 0, 0)
    fitting = (height, width, channels)
    shape = images.shape[1:] if images.ndim != 3 else (*images.shape[1:], 1)
    if images.dtype != np.uint8 or shape != fitting or not len(images):
        raise DataError(
            f"got images of dtype {images.dtype} and shape {images.shape} in '{name}', expected "
            f"uint8 (N, {', '.join(map(str, fitting))}) as the teacher takes, N > 0; let a "
            "recipe's source of kind 'folder' resize them, or do it before"
        )
