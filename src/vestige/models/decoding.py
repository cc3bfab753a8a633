"""Drawing continuations of many prompts at once from a causal language model."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.writing import Sampling

# Larger candidates are looked at only where the most likely ones do not hold enough mass.
_CANDIDATES = 128
# Rows that are done leave the batch once they are so many of it.
_DONE_SHARE = 0.25


@dataclass(frozen=True)
class Drawn:
    """Tokens of one continuation and the sum of their log-probabilities in nats."""

    tokens: list[int]
    logprob: float


def self_debiased(
    own: Float[Tensor, "rows vocabulary"],
    others: Float[Tensor, "rows labels vocabulary"],
    *,
    decay: float,
    floor: float,
) -> Float[Tensor, "rows vocabulary"]:
    """Probabilities without what the other labels' prompts like better.

    m = max(max over others of q - p, 0); a = max(exp(-decay m), floor); p' = a p / sum of a p.

    Args:
        own: p, behind the label's own prompt.
        others: q, behind those of the other labels.
        decay: lambda; 0 changes nothing.
        floor: epsilon, the least factor.
    """
    excess = (others.amax(1) - own).clamp_min(0)
    kept = own * torch.exp(-decay * excess).clamp_min(floor)
    return kept / kept.sum(1, keepdim=True)


def nucleus(
    probs: Float[Tensor, "rows vocabulary"], *, top_p: float, top_k: int
) -> tuple[Float[Tensor, "rows candidates"], Int[Tensor, "rows candidates"] | None]:
    """What may be drawn: the smallest set with a mass of at least `top_p`, of at most `top_k`.

    Returns:
        Probabilities that add up to 1, and the tokens that they are of; None stands for all in
        their order, so that with top_p = 1 and top_k = 0 plain sampling is left.
    """
    if top_p >= 1 and not top_k:
        return probs, None
    size = probs.shape[1]
    count = min(size, top_k or _CANDIDATES)
    values, tokens = probs.topk(count)
    if not top_k and count < size and bool((values.sum(1) < top_p).any()):
        values, tokens = probs.sort(1, descending=True)
    # The token that crosses the border belongs to the set.
    before = values.cumsum(1) - values
    values = values.masked_fill(before >= top_p, 0)
    return values / values.sum(1, keepdim=True), tokens


def draw_token(
    probs: Float[Tensor, "rows vocabulary"], sampling: Sampling, rng: torch.Generator
) -> Int[Tensor, " rows"]:
    """One token of each row; the likeliest at temperature 0."""
    if sampling.temperature == 0:
        return probs.argmax(1)
    if sampling.top_p < 1 and not sampling.top_k:
        return _accepted(probs, sampling.top_p, rng)
    shares, tokens = nucleus(probs, top_p=sampling.top_p, top_k=sampling.top_k)
    drawn = torch.multinomial(shares, 1, generator=rng)
    return (drawn if tokens is None else tokens.gather(1, drawn))[:, 0]


def _accepted(probs: Tensor, top_p: float, rng: torch.Generator) -> Tensor:
    """A token of the nucleus of each row, (rows,), without sorting.

    A token drawn from all of them is taken if the likelier ones hold less than `top_p`, and drawn
    again otherwise: that is a draw from the nucleus, and less than one in ten goes at 0.9.
    """
    tokens = torch.multinomial(probs, 1, generator=rng)
    while True:
        likelier = probs * (probs > probs.gather(1, tokens))
        again = (likelier.sum(1) >= top_p).nonzero()[:, 0]
        if not len(again):
            return tokens[:, 0]
        tokens[again] = torch.multinomial(probs[again], 1, generator=rng)


class Decoder:
    """Continues prompts with a causal language model of transformers.

    The prefix of a prompt is computed once for all of its continuations; prompts are sorted by
    length and padded on the left, with positions that do not count the padding; rows that are done
    leave the batch.

    Args:
        network: called with `input_ids`, `attention_mask` and `past_key_values`.
        stops: (V,), the tokens after which a text is done.
        context: tokens that the network can see.
        rows: continuations at a time.
    """

    def __init__(
        self, network: nn.Module, stops: Bool[Tensor, " vocabulary"], *, context: int, rows: int
    ) -> None:
        self._network = network
        self._stops = stops
        self._context = context
        self._rows = rows
        taken = inspect.signature(network.forward).parameters
        self._positions = "position_ids" in taken
        self._last = "logits_to_keep" in taken

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        count: int,
        sampling: Sampling,
        rng: torch.Generator,
    ) -> list[list[Drawn]]:
        """`count` continuations of each prompt.

        Args:
            prompts: tokens of N prompts, each with those of the other labels behind it, of which
                there are equally many; longer ones lose their beginning.
            count: of each.
            sampling: how; where there are other labels, the draw is self-debiased.
            rng: on the network's device.
        """
        found: list[list[Drawn]] = [[] for _ in prompts]
        # Where both do not fit, a prompt keeps half of what can be seen, and the text is shorter.
        room = max(1, self._context // 2, self._context - sampling.new_tokens)
        cut = [[list(tokens)[-room:] for tokens in group] for group in prompts]
        order = sorted(range(len(cut)), key=lambda index: max(map(len, cut[index])))
        width = len(cut[0]) if cut else 1
        copies = min(count, max(1, self._rows // width))
        together = max(1, self._rows // (width * copies))
        for done in range(0, count, copies):
            wanted = min(copies, count - done)
            for start in range(0, len(order), together):
                chosen = order[start : start + together]
                drawn = self._batch([cut[index] for index in chosen], wanted, sampling, rng)
                for place, index in enumerate(chosen):
                    found[index] += drawn[place * wanted : (place + 1) * wanted]
        return found

    def _batch(
        self,
        groups: list[list[list[int]]],
        count: int,
        sampling: Sampling,
        rng: torch.Generator,
    ) -> list[Drawn]:
        from transformers import DynamicCache

        width, device = len(groups[0]), self._stops.device
        flat = [tokens for group in groups for tokens in group]
        longest = max(map(len, flat))
        tokens = torch.zeros(len(flat), longest, dtype=torch.long)
        mask = torch.zeros(len(flat), longest, dtype=torch.long)
        for row, one in enumerate(flat):
            tokens[row, longest - len(one) :] = torch.tensor(one)
            mask[row, longest - len(one) :] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        padded = bool((mask == 0).any())
        cache: Any = DynamicCache(config=self._network.config)
        logits = self._next(tokens, mask, cache, padded=padded)
        # Rows in the order group, copy, label: every copy of a group has all of its labels.
        rows = torch.arange(len(flat), device=device).view(-1, 1, width)
        rows = rows.expand(-1, count, -1).reshape(-1)
        cache.batch_select_indices(rows)
        logits, mask = logits[rows], mask[rows]
        texts, steps = len(groups) * count, min(sampling.new_tokens, self._context - longest)
        kept = torch.zeros(texts, steps, dtype=torch.long, device=device)
        lengths = torch.zeros(texts, dtype=torch.long, device=device)
        sums = torch.zeros(texts, device=device)
        alive = torch.arange(texts, device=device)
        for step in range(steps):
            plain, token = self._drawn(logits.view(-1, width, logits.shape[1]), sampling, rng)
            live = lengths[alive] == step
            kept[alive, step] = token
            lengths[alive] += live
            sums[alive] += torch.where(live, plain.gather(1, token[:, None])[:, 0], 0.0)
            going = live & ~self._stops[token]
            left = int(going.sum())
            if step + 1 == steps or left == 0:
                break
            if left <= (1 - _DONE_SHARE) * len(alive):
                stay = going.nonzero()[:, 0]
                alive, token = alive[stay], token[stay]
                rows = (stay[:, None] * width + torch.arange(width, device=device)).flatten()
                cache.batch_select_indices(rows)
                mask = mask[rows]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            fed = token.repeat_interleave(width)[:, None]
            logits = self._next(fed, mask, cache, padded=padded)
        return [
            Drawn(row[:length], total)
            for row, length, total in zip(
                kept.tolist(), lengths.tolist(), sums.tolist(), strict=True
            )
        ]

    def _next(self, tokens: Tensor, mask: Tensor, cache: Any, *, padded: bool) -> Tensor:
        """Logits (rows, V) of what follows."""
        given: dict[str, Any] = {"logits_to_keep": 1} if self._last else {}
        if padded:
            given["attention_mask"] = mask
        if self._positions:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        answer = self._network(input_ids=tokens, past_key_values=cache, use_cache=True, **given)
        logits: Tensor = answer.logits[:, -1]
        return logits.float()

    def _drawn(
        self, logits: Tensor, sampling: Sampling, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities (texts, V) as the network has them, and a token of each text."""
        plain = F.log_softmax(logits[:, 0], 1)
        if sampling.temperature in (0, 1):
            probs = F.softmax(logits, 2)
        else:
            probs = F.softmax(logits / sampling.temperature, 2)
        own = probs[:, 0]
        if probs.shape[1] > 1 and sampling.debias_decay:
            own = self_debiased(
                own, probs[:, 1:], decay=sampling.debias_decay, floor=sampling.debias_floor
            )
        return plain, draw_token(own, sampling, rng)
