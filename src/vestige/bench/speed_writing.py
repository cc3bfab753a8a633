"""Texts of a language model: our generation, and plain loops of transformers' `generate`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vestige.bench.speed_case import SpeedCase
from vestige.core.seeding import seeded
from vestige.core.texts import to_bytes
from vestige.core.writing import QUOTE, Sampling
from vestige.models.language_models import SmallLanguageModel

# Texts of one call of `generate`, all behind one prompt.
TOGETHER = 32
# Chance that a token closes the quote: texts of 17 tokens in the mean, of at most 40.
_CLOSES = 0.05
_SAMPLING = Sampling(new_tokens=40, top_p=0.9)


def writing() -> SpeedCase:
    """32 texts for each of 4 prompts, top-p 0.9, from a GPT-2 of 4 layers of 128.

    "one at a time" and "32 at a time" call `generate` of the same network with the same sampling,
    for one text, or with num_return_sequences 32; both stop at the closing quote as ours does. "32
    at a time, forced" always writes 40 tokens, as the paper's code does.
    """
    lm = small_writer()
    prompts = [lm.prompts.prompt_of(name) for name in lm.prompts.names]
    return SpeedCase(
        TOGETHER * len(prompts),
        "texts",
        {
            "vestige": lambda: ours(lm, prompts, _SAMPLING),
            "one at a time": lambda: plain(lm, prompts, _SAMPLING, together=1),
            "32 at a time": lambda: plain(lm, prompts, _SAMPLING, together=TOGETHER),
            "32 at a time, forced": lambda: plain(
                lm, prompts, _SAMPLING, together=TOGETHER, stops=False
            ),
        },
        {
            "prompts": len(prompts),
            "texts_each": TOGETHER,
            "new_tokens": _SAMPLING.new_tokens,
            **{key: getattr(lm.network.config, key) for key in ("n_layer", "n_embd", "vocab_size")},
        },
    )


def small_writer(layers: int = 4, width: int = 128, vocabulary: int = 4000) -> SmallLanguageModel:
    """A network that nobody trained, but whose texts end."""
    with seeded(0, "speed"):
        lm = SmallLanguageModel(
            4, prompts="ag-news", layers=layers, width=width, vocabulary=vocabulary
        )
    rng = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (400, 12), generator=rng).tolist()
    lm.learn_vocabulary(to_bytes(["".join(map(chr, row)) for row in letters], 16))
    network: Any = lm.network
    closing = lm.tokens().encode([QUOTE])[0][-1]
    # Not shared with the input: such a network would repeat its last token. Logits with a variance
    # of 6 make tokens of very different likelihood, as those of a language.
    table = torch.randn(vocabulary, width, generator=rng) * (6 / width) ** 0.5
    others = math.log(vocabulary) + 3
    with torch.no_grad():
        # The first of the last states is always 1, and says how likely the closing quote is.
        network.transformer.ln_f.weight[0], network.transformer.ln_f.bias[0] = 0.0, 1.0
        table[:, 0], table[closing] = 0.0, 0.0
        table[closing, 0] = others + math.log(_CLOSES / (1 - _CLOSES))
    network.lm_head.weight = nn.Parameter(table)
    return lm.eval()


def ours(lm: SmallLanguageModel, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """`TOGETHER` texts of each prompt, in order."""
    rng = torch.Generator().manual_seed(0)
    return [one.text for row in lm.generate(prompts, TOGETHER, sampling, rng) for one in row]


def plain(
    lm: SmallLanguageModel,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    together: int,
    stops: bool = True,
) -> list[str]:
    """The same texts by `generate`, `together` of one prompt per call."""
    tokens, network = lm.tokens(), lm.network
    marks = tokens.marks(QUOTE, network.config.vocab_size).nonzero()[:, 0].tolist()
    given: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        given = {"do_sample": True, "top_p": sampling.top_p, "top_k": sampling.top_k}
    if not stops:
        given["min_new_tokens"] = sampling.new_tokens
    written: list[str] = []
    torch.manual_seed(0)
    for prompt in prompts:
        ids = torch.tensor(tokens.encode([prompt]))
        for _ in range(TOGETHER // together):
            found: Tensor = network.generate(
                ids.expand(together, -1),
                attention_mask=torch.ones(together, ids.shape[1], dtype=torch.long),
                max_new_tokens=sampling.new_tokens,
                eos_token_id=marks,
                pad_token_id=0,
                **given,
            )
            for text in tokens.decode(found[:, ids.shape[1] :].tolist()):
                before, quote, _ = text.partition(QUOTE)
                written.append(before + quote)
    return written
