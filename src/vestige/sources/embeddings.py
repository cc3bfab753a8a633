"""Made-up texts as embeddings of words: where they start, and what of them must not move."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vestige.errors import RecipeError

PriorName = Literal["normal", "tokens"]


@dataclass(frozen=True)
class Crafted:
    """A batch of made-up texts.

    Attributes:
        words: (B, l, d), embeddings of words before positions and LayerNorm.
        free: (B, l) bool, the places of words; the others hold special tokens and are constants.
        mask: (B, l) int64, 1 up to the end of a text and 0 behind it.
    """

    words: Tensor
    free: Tensor
    mask: Tensor


class EmbeddingPrior:
    """Draws texts of noise, or of tokens that are drawn by chance.

    The first place is the token that begins a text, the last one of a text the token that ends it,
    and what is behind that is the token that fills up; a tokenizer without one of these leaves its
    place to words, or zeros behind the end.

    Args:
        table: embeddings of all tokens, (V, d); looked at, never changed.
        special: numbers of the tokens that begin, end, fill up and mask, in this order; -1 where
            there is none.
        length: places of a text, special tokens included, l.
        shortest: the fewest places of a text; lengths are uniform between the two.
        prior: "normal" draws every value, "tokens" takes embeddings of tokens, special ones aside.
        mean: of "normal"; None is the mean of the table.
        std: of "normal"; None is the deviation of the table.

    Raises:
        RecipeError: lengths that leave no word.
    """

    def __init__(
        self,
        table: Tensor,
        special: Tensor,
        *,
        length: int,
        shortest: int | None = None,
        prior: PriorName = "normal",
        mean: float | None = None,
        std: float | None = None,
    ) -> None:
        self.table = table.detach()
        self.begin, self.end, self.fill, self.blank = special.tolist()
        self.shortest = length if shortest is None else shortest
        if not 3 <= self.shortest <= length:
            raise RecipeError(
                f"got texts of {self.shortest} to {length} places, expected at least 3 (what "
                "begins a text, a word and what ends it), and the shortest not above the longest"
            )
        self.length = length
        self.prior = prior
        self.mean = float(self.table.mean()) if mean is None else mean
        self.std = float(self.table.std()) if std is None else std
        ordinary = torch.ones(len(table), dtype=torch.bool, device=table.device)
        ordinary[[one for one in special.tolist() if one >= 0]] = False
        self.ordinary = ordinary.nonzero()[:, 0]

    def draw(self, count: int, rng: torch.Generator) -> Crafted:
        """`count` texts, without gradient, on the device of `rng`."""
        device, width = rng.device, self.table.shape[1]
        table = self.table.to(device)
        shape = (count, self.length)
        ends = torch.randint(
            self.shortest, self.length + 1, (count, 1), generator=rng, device=device
        )
        if self.prior == "tokens":
            chosen = torch.randint(len(self.ordinary), shape, generator=rng, device=device)
            words = table[self.ordinary.to(device)[chosen]]
        else:
            noise = torch.randn(*shape, width, generator=rng, device=device)
            words = noise * self.std + self.mean
        places = torch.arange(self.length, device=device).expand(shape)
        inside = places < ends
        behind, fixed = ~inside, ~inside
        filler = table[self.fill] if self.fill >= 0 else words.new_zeros(width)
        words = torch.where(behind[..., None], filler, words)
        for token, where in ((self.begin, places == 0), (self.end, places == ends - 1)):
            # Without such a token a word stays there, as free as the others.
            if token >= 0:
                words = torch.where(where[..., None], table[token], words)
                fixed = fixed | where
        return Crafted(words, ~fixed, inside.long())

    def choose_masked(self, crafted: Crafted, share: float, rng: torch.Generator) -> Tensor:
        """Places of words to be masked, (B, l) bool: one of each text, or each with chance `share`.

        With a share at least one place of each text is masked, too.
        """
        chance = torch.rand(crafted.free.shape, generator=rng, device=rng.device)
        chance = chance.masked_fill(~crafted.free, -1.0)
        one = torch.zeros_like(crafted.free).scatter_(1, chance.argmax(1, keepdim=True), True)
        return one | (chance > 1 - share) if share else one

    def longest_norm(self, quantile: float) -> float:
        """The norm that a share of `quantile` of all tokens does not exceed."""
        return float(self.table.norm(dim=1).quantile(quantile))
