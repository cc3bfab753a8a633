"""What clients keep for themselves between rounds, on their own disk."""

import os
import re
from pathlib import Path

from safetensors.torch import load_file, save_file

from vestige.core.federation import Payload

# A position in a run: the round, and the how manieth time in it that clients are asked.
Position = tuple[int, int]

_FILE = re.compile(r"(\d{8})-(\d{4})\.safetensors")


class ClientStates:
    """One folder for each client, one file for each time that its state changed.

    A file is never changed. Who is asked at a position reads the newest state from before it, so a
    run that goes on from an earlier round finds what it would have found then.

    Args:
        folder: of one run; each client has a folder of its own in it.
        keep: rounds that are kept; a run must not go back further.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def load(self, partition: int, before: Position) -> Payload:
        """The newest state from before a position, {} if there is none."""
        known = [found for found in self._found(partition) if found[0] < before]
        if not known:
            return {}
        groups: dict[str, dict[str, object]] = {}
        for key, value in load_file(max(known)[1]).items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = value
        return groups  # type: ignore[return-value]

    def save(self, partition: int, at: Position, state: Payload) -> None:
        """Keep a state, and forget those that no run goes back to."""
        home = self._home(partition)
        home.mkdir(parents=True, exist_ok=True)
        flat = {
            f"{group}/{name}": value.detach().cpu().contiguous()
            for group, arrays in state.items()
            for name, value in arrays.items()
        }
        path = home / f"{at[0]:08d}-{at[1]:04d}.safetensors"
        # A killed client leaves no half file under the name that is read.
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(flat, unfinished)
        os.replace(unfinished, path)
        old = sorted(found for found in self._found(partition) if found[0][0] <= at[0] - self.keep)
        for _, stale in old[:-1]:
            stale.unlink(missing_ok=True)

    def _home(self, partition: int) -> Path:
        return self.folder / f"{partition:06d}"

    def _found(self, partition: int) -> list[tuple[Position, Path]]:
        home = self._home(partition)
        if not home.is_dir():
            return []
        matches = ((_FILE.fullmatch(path.name), path) for path in home.iterdir())
        return [((int(m[1]), int(m[2])), path) for m, path in matches if m is not None]
