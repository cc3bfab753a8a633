"""Causal language models that write texts of a label, and judge texts by their prompts."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.texts import PAIR, as_pair, to_texts
from vestige.core.types import Prediction
from vestige.core.writing import QUOTE, Sampling, Written
from vestige.errors import RecipeError, ShapeError
from vestige.models.bpe import BytePairs
from vestige.models.decoding import Decoder
from vestige.models.huggingface import need_transformers
from vestige.models.prompts import Prompts, load_prompts
from vestige.models.sizes import take_sizes

IGNORED = -100


class Tokens(Protocol):
    """What splits texts for a language model."""

    def encode(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, tokens: list[list[int]]) -> list[str]: ...

    def marks(self, mark: str, size: int) -> Tensor: ...


@dataclass(frozen=True)
class _Sentences:
    """Texts in their sentences: tokens, and what of them is counted."""

    tokens: Tensor
    targets: Tensor


class LanguageModel(nn.Module):
    """A causal language model with a tokenizer and the prompts of a task.

    As a classifier it is the prompting baseline: the label whose sentence around the text has the
    lowest mean loss per token.

    Args:
        network: a causal language model of transformers.
        prompts: of the task; `prompts.names` are the classes.
        context: tokens that the network can see.
        calibrated: subtract the loss of the sentence around no text before dividing by the length.
        rows: sentences, or a quarter of the continuations, that are computed at a time.
        contrast: weight of the term of `training_loss` that tells labels apart.
        forget: share of a text's tokens that `training_loss` hides from what comes after them.
    """

    def __init__(
        self,
        network: Any,
        prompts: Prompts,
        *,
        context: int,
        calibrated: bool = False,
        rows: int = 32,
        contrast: float = 0.0,
        forget: float = 0.0,
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.prompts = prompts
        self.context = context
        self.calibrated = calibrated
        self.rows = rows
        self.contrast, self.forget = contrast, forget
        # By digests of rows: who judges a run asks the same thing again and again.
        self._known: dict[bytes, Tensor] = {}

    def tokens(self) -> Tokens:
        """The tokenizer."""
        raise NotImplementedError

    def name_classes(self, names: Sequence[str]) -> None:
        """Call and order the labels as the classes of a data set.

        Raises:
            RecipeError: they do not fit the labels.
        """
        self.prompts = self.prompts.for_classes(names)
        self._known.clear()

    def train(self, mode: bool = True) -> Self:
        """As for any module; what was judged before is forgotten."""
        if mode:
            self._known.clear()
        return super().train(mode)

    # Writing

    def generate(
        self,
        prompts: Sequence[str],
        count: int,
        sampling: Sampling,
        rng: torch.Generator,
        *,
        others: Sequence[Sequence[str]] = (),
    ) -> list[list[Written]]:
        """`count` continuations of each prompt, see `core.writing.WritesTexts`."""
        tokens, size = self.tokens(), int(self.network.config.vocab_size)
        width = 1 + (len(others[0]) if others else 0)
        texts = [
            text
            for index, prompt in enumerate(prompts)
            for text in (prompt, *(others[index] if others else ()))
        ]
        # Equal prompts are split once; a task without contexts has as many as labels.
        known = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        split = tokens.encode([*known])
        ids = [split[known[text]] for text in texts]
        groups = [ids[start : start + width] for start in range(0, len(ids), width)]
        stops = tokens.marks(QUOTE, size).to(self.device)
        decoder = Decoder(self.network, stops, context=self.context, rows=4 * self.rows)
        drawn = decoder.draw(groups, count, sampling, rng)
        flat = [one for row in drawn for one in row]
        written = [
            Written(_up_to_quote(text), one.logprob / max(1, len(one.tokens)))
            for text, one in zip(tokens.decode([one.tokens for one in flat]), flat, strict=True)
        ]
        return [written[start : start + count] for start in range(0, len(written), count)]

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        found: torch.device = next(self.network.parameters()).device
        return found

    # Judging

    def forward(self, rows: UInt8[Tensor, "batch bytes"]) -> Prediction:
        """Minus the mean loss of each label's sentence around each text, (B, K), in nats.

        In eval mode and without gradient, what was asked before is answered from memory.
        """
        if self.training or torch.is_grad_enabled():
            return self._judged(rows)
        versions = [weight._version for weight in self.parameters()]
        content = rows.cpu().contiguous().numpy().tobytes()
        key = hashlib.sha256(f"{versions}{tuple(rows.shape)}{self.calibrated}".encode() + content)
        found = self._known.get(key.digest())
        if found is None:
            found = self._known[key.digest()] = self._judged(rows).logits.cpu()
        return Prediction(found.to(self.device))

    def _judged(self, rows: Tensor) -> Prediction:
        texts = to_texts(rows)
        names = self.prompts.names
        sums, counts = self._losses(texts, names)
        if self.calibrated:
            pairs = self.prompts.kind == "pair"
            # Around no text, but about the same first text where there are two.
            empty = [f"{as_pair(text)[0]}{PAIR}" if pairs else "" for text in texts]
            sums = sums - self._losses(empty, names)[0]
        return Prediction(-sums / counts)

    def _losses(self, texts: Sequence[str], names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Summed losses of every label's sentences around the texts, and how many tokens, (B, K).

        The first token has nothing before it and is not counted.
        """
        sums = torch.zeros(len(texts), len(names), device=self.device)
        counts = torch.ones_like(sums)
        for column, name in enumerate(names):
            found = self._sentences(texts, [name] * len(texts), whole=True)
            order = sorted(range(len(texts)), key=lambda row: len(found[row][0]))
            for start in range(0, len(order), self.rows):
                index = torch.tensor(order[start : start + self.rows], device=self.device)
                batch = _padded([found[row] for row in order[start : start + self.rows]])
                losses, counted = self._token_losses(batch)
                sums[index, column] = losses.sum(1)
                counts[index, column] = counted.sum(1).clamp_min(1).to(sums)
        return sums, counts

    def training_loss(
        self, inputs: UInt8[Tensor, "batch bytes"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Mean loss per token of texts behind their label's prompt, and of the closing quote.

        The prompt itself is given and not counted, so that all that is learned is what a label's
        texts are like. Where the quote would not fit, the text is cut before it. Double quotes
        inside a text become single ones, since a double quote says that the text ends.

        With `contrast`, the loss of each text is compared with that behind another label, drawn
        from torch's global random state: log(1 + exp(right - wrong)), sums over its tokens, mean
        over texts. A small model learns last of all what the label is good for; this tells it.

        With `forget`, that share of the text's tokens, drawn likewise, is seen as token 0 by what
        comes after them, though it is to be predicted as ever: so less is gained by learning texts
        by heart, and more by looking at the label.

        Args:
            inputs: rows of bytes.
            labels: class numbers.
        """
        names = [self.prompts.names[label] for label in labels.tolist()]
        texts = to_texts(inputs)
        if not self.contrast:
            losses, counted = self._token_losses(
                _padded(self._sentences(texts, names, whole=False))
            )
            return losses.sum() / counted.sum().clamp_min(1)
        count = len(self.prompts.names)
        shift = torch.randint(1, count, labels.shape)
        wrong = [self.prompts.names[one] for one in ((labels.cpu() + shift) % count).tolist()]
        both = self._sentences([*texts, *texts], [*names, *wrong], whole=False)
        losses, counted = self._token_losses(_padded(both))
        right, other = losses.sum(1).chunk(2)
        plain = right.sum() / counted[: len(texts)].sum().clamp_min(1)
        return plain + self.contrast * F.softplus(right - other).mean()

    def _token_losses(self, batch: _Sentences) -> tuple[Tensor, Tensor]:
        """Loss of each token behind the first, 0 where it is not counted, and which are."""
        tokens, targets = batch.tokens.to(self.device), batch.targets.to(self.device)
        if self.training and self.forget:
            hidden = torch.rand(tokens.shape, device=tokens.device) < self.forget
            tokens = tokens.masked_fill(hidden & (targets != IGNORED), 0)
        # Padding stands on the right, where nothing that counts looks at it.
        logits = self.network(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view(len(tokens), -1), targets[:, 1:] != IGNORED

    def _sentences(
        self, texts: Sequence[str], names: Sequence[str], *, whole: bool
    ) -> list[tuple[list[int], int]]:
        """Tokens of each text in its sentence, and how many at its start are not counted."""
        around, bodies = [], []
        for text, name in zip(texts, names, strict=True):
            context, body = "", text
            if self.prompts.kind == "pair":
                context, second = as_pair(text)
                body = second or ""
            if whole:
                around.append(self.prompts.sentence(name, context))
            else:
                around.append((self.prompts.prompt_of(name, context), QUOTE))
            bodies.append(body.replace(QUOTE, "'").strip())
        tokens = self.tokens()
        known = {
            part: number
            for number, part in enumerate(dict.fromkeys(part for pair in around for part in pair))
        }
        split = tokens.encode([*known])
        made = []
        for (before, after), inner in zip(around, tokens.encode(bodies), strict=True):
            head, tail = split[known[before]], split[known[after]]
            if self.prompts.kind != "text":
                # A long first text loses its beginning, so that there is room for the second.
                head = head[-max(1, self.context // 2) :]
            room = self.context - len(head) - len(tail)
            if room < 1:
                raise RecipeError(
                    f"got a prompt of {len(head) + len(tail)} tokens ({before[:40]!r}...) for a "
                    f"language model that sees {self.context}, expected room for a text; take a "
                    "model with a longer context"
                )
            made.append((head + inner[:room] + tail, 0 if whole else len(head)))
        return made


class SmallLanguageModel(LanguageModel):
    """A small GPT-2 with a tokenizer of its own, which is learned from the texts it is trained on.

    Args:
        num_classes: K, as many as the prompts have labels.
        prompts: name or file of the prompts, see `models.prompts`.
        layers: of the network.
        width: of its hidden states; a multiple of `heads`.
        heads: of attention.
        context: tokens that it can see, prompt and closing quote included.
        vocabulary: kinds of tokens.
        dropout: of embeddings, attention and outputs while it is trained.
        calibrated: see `LanguageModel`.
        contrast: likewise, where it is trained.
        forget: likewise.
    """

    pieces: Tensor
    sized_by_state = ("pieces",)

    def __init__(
        self,
        num_classes: int,
        *,
        prompts: str,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        context: int = 96,
        vocabulary: int = 4000,
        dropout: float = 0.1,
        calibrated: bool = False,
        contrast: float = 0.0,
        forget: float = 0.0,
    ) -> None:
        need_transformers("a language model")
        from transformers import GPT2Config, GPT2LMHeadModel

        known = load_prompts(prompts)
        if len(known.names) != num_classes:
            raise RecipeError(
                f"got num_classes={num_classes} for the prompts {known.name!r}, expected "
                f"{len(known.names)}: {', '.join(known.names)}; correct one of the two"
            )
        if width % heads or vocabulary < 300 or context < 16:
            raise RecipeError(
                f"got width {width}, heads {heads}, vocabulary {vocabulary}, context {context}, "
                "expected a width that is a multiple of heads, a vocabulary of at least 300 and a "
                "context of at least 16; correct them"
            )
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=context,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            activation_function="relu",
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
        network: Any = GPT2LMHeadModel(config)
        how: dict[str, Any] = {"calibrated": calibrated, "contrast": contrast, "forget": forget}
        super().__init__(network, known, context=context, **how)
        self.register_buffer("pieces", torch.zeros(0, dtype=torch.uint8))
        self._split: tuple[Tensor, BytePairs] | None = None

    def learn_vocabulary(self, texts: UInt8[Tensor, "texts bytes"]) -> None:
        """Learn how to split texts into tokens, from prompts and texts."""
        if texts.dim() != 2 or not len(texts):
            raise ShapeError(f"got texts of shape {tuple(texts.shape)}, expected (N, bytes), N > 0")
        read = [text.replace(PAIR, " ").replace(QUOTE, "'") for text in to_texts(texts)]
        prompts = [self.prompts.prompt_of(name) for name in self.prompts.names]
        # Often enough that a prompt is a few tokens.
        sample = [*read, *(prompts * (len(read) // (4 * len(prompts)) + 1))]
        size = int(self.network.config.vocab_size)
        self.pieces = BytePairs.learn(sample, size).to(self.device)

    def tokens(self) -> Tokens:
        """The tokenizer that was learned."""
        if self._split is None or self._split[0] is not self.pieces:
            self._split = self.pieces, BytePairs(self.pieces)
        return self._split[1]

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        take_sizes(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *rest)
        self._split = None


def _padded(sentences: Sequence[tuple[list[int], int]]) -> _Sentences:
    longest = max(2, *(len(tokens) for tokens, _ in sentences))
    tokens = torch.zeros(len(sentences), longest, dtype=torch.long)
    targets = torch.full_like(tokens, IGNORED)
    for row, (one, given) in enumerate(sentences):
        tokens[row, : len(one)] = torch.tensor(one)
        targets[row, given : len(one)] = tokens[row, given : len(one)]
    return _Sentences(tokens, targets)


def _up_to_quote(text: str) -> str:
    before, quote, _ = text.partition(QUOTE)
    return before + quote
