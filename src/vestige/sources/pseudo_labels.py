"""A store of what a network heard in the rows of a source: transcripts with their scores."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vestige.core.texts import to_bytes, to_texts
from vestige.core.transcripts import Transcripts
from vestige.errors import ContractError

_KEYS = ("texts", "tokens", "log_probs", "entropies", "written", "ended")


class PseudoLabels:
    """Transcripts in the order of the rows; each `add` is one shard of a checkpoint.

    On the CPU. A `core.protocols.Sharded`.
    """

    def __init__(self) -> None:
        self._shards: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return sum(len(shard["written"]) for shard in self._shards)

    def add(self, heard: Transcripts) -> None:
        """Append what was heard in the rows that come next."""
        length = max([1, *(4 * len(text) for text in heard.texts)])
        self._shards.append(
            {
                "texts": to_bytes(heard.texts, length),
                "tokens": heard.tokens.to(torch.int32),
                "log_probs": heard.log_probs,
                "entropies": heard.entropies,
                "written": heard.written,
                "ended": heard.ended.to(torch.uint8),
            }
        )

    def all(self) -> Transcripts:
        """Everything in one; all networks write rows of one length."""
        if not self._shards:
            raise ContractError("got no transcripts, expected some; label the source first")
        joined = {key: torch.cat([one[key] for one in self._shards]) for key in _KEYS[1:]}
        return Transcripts(
            [text for shard in self._shards for text in to_texts(shard["texts"])],
            joined["tokens"].long(),
            joined["log_probs"],
            joined["entropies"],
            joined["written"],
            joined["ended"].bool(),
        )

    def shard_count(self) -> int:
        """Number of shards, one per `add`."""
        return len(self._shards)

    def shard(self, index: int) -> Mapping[str, Tensor]:
        """Shard `index` as it is stored."""
        return self._shards[index]

    def load_shards(self, shards: Iterable[Mapping[str, Tensor]]) -> None:
        """Replace the content by `shards`, as `shard` gave them."""
        self._shards = [dict(shard) for shard in shards]


class Scores:
    """Scores of all rows by the name of what gave them, NaN where it gives none."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def state_dict(self) -> Mapping[str, Tensor]:
        """All of them, each (N,) float64."""
        return dict(self.values)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.values = dict(state)
