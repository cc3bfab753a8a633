"""A speech recogniser of Whisper's shape with its own mel front end and tokenizer."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.core.modes import evaluating
from vestige.core.texts import to_texts
from vestige.core.transcripts import Transcripts
from vestige.core.types import Prediction
from vestige.errors import DataError, RecipeError, ShapeError
from vestige.models.huggingface import need_transformers
from vestige.models.layer_choice import Choice, choose_layers
from vestige.models.mel import LogMel
from vestige.models.sizes import take_sizes
from vestige.models.spoken_tokens import OwnTokens, SpokenTokens, Unit, read_tokens, stored_bytes


class SpeechRecognizer(nn.Module):
    """Waveforms in, logits of tokens or transcripts out: Whisper of transformers inside.

    Its tokens are bytes in the buffer `vocabulary`, thus part of its weights' file. A new one has
    to see texts first: `learn_vocabulary`.

    Args:
        sample_rate_hz: of the waveforms.
        window_samples: longest recording, a multiple of 2 * `hop_samples`; others are filled up.
        whisper: arguments of WhisperConfig, all that differ from its defaults.
        hop_samples: of the mel front end.
        n_fft: likewise.
        highest_hz: likewise.
        unit: of its own tokens.
        prompt: tokens that every transcript begins with; () is Whisper's start token.
        suppressed: tokens that are never written.
        suppressed_first: tokens that are not written first.
        max_tokens: longest transcript with prompt and end; None is what the network has room for.
        card: name and arguments under which `models.factory` builds this network again.

    Raises:
        MissingExtraError: transformers is not installed.
    """

    vocabulary: Tensor
    # Of `core.protocols.SizedByState`: every tokenizer has a length of its own.
    sized_by_state = ("vocabulary",)

    def __init__(
        self,
        sample_rate_hz: int,
        window_samples: int,
        whisper: Mapping[str, Any],
        *,
        hop_samples: int = 160,
        n_fft: int = 400,
        highest_hz: float = 8000.0,
        unit: Unit = "words",
        prompt: Sequence[int] = (),
        suppressed: Sequence[int] = (),
        suppressed_first: Sequence[int] = (),
        max_tokens: int | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        need_transformers("a speech recogniser", extra="speech")
        from transformers import WhisperConfig, WhisperForConditionalGeneration

        config = WhisperConfig(**whisper)
        self.network: Any = WhisperForConditionalGeneration(config)
        self.front = LogMel(
            sample_rate_hz,
            window_samples,
            mel_bins=int(config.num_mel_bins),
            hop_samples=hop_samples,
            n_fft=n_fft,
            highest_hz=highest_hz,
        )
        self.unit: Unit = unit
        self.prompt = tuple(prompt) or (int(config.decoder_start_token_id),)
        self.end, self.pad = int(config.eos_token_id), int(config.pad_token_id)
        self.vocab_size, room = int(config.vocab_size), int(config.max_target_positions)
        self.longest = min(room, max_tokens or room)
        self._suppressed, self._suppressed_first = tuple(suppressed), tuple(suppressed_first)
        self._card = copy.deepcopy(dict(card or {}))
        self._tokens: SpokenTokens | None = None
        self.register_buffer("vocabulary", torch.zeros(0, dtype=torch.uint8))

    @property
    def encoder(self) -> nn.Module:
        """The part that listens; it may be frozen and shared."""
        part: nn.Module = self.network.model.encoder
        return part

    def encode(self, waveforms: Tensor) -> Tensor:
        """What the decoder listens to, (B, positions, width), of waveforms (B, samples)."""
        hidden: Tensor = self.network.model.encoder(self.front(waveforms)).last_hidden_state
        return hidden

    def forward(
        self,
        waveforms: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoded: Tensor | None = None,
    ) -> Prediction:
        """Logits (B, T, V): at each place of the token that follows it.

        Args:
            waveforms: (B, samples) in [-1, 1].
            decoder_input_ids: (B, T) int64; None reads the prompt alone.
            encoded: what `encode` gave, in place of the waveforms.

        Raises:
            ShapeError: neither waveforms nor `encoded` are given, or both.
        """
        if (waveforms is None) == (encoded is None):
            raise ShapeError(
                "got both or none of waveforms and encoded, expected one; hand in waveforms"
            )
        if waveforms is not None:
            encoded = self.encode(waveforms)
        if encoded is None:
            raise ShapeError("got no recordings, expected waveforms")
        if decoder_input_ids is None:
            decoder_input_ids = self._prompts(len(encoded), encoded.device)
        decoded = self.network.model.decoder(
            input_ids=decoder_input_ids, encoder_hidden_states=encoded, use_cache=False
        )
        return Prediction.of(self.network.proj_out(decoded.last_hidden_state))

    def training_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy () in nats per token, the end among them; see `core.OwnLoss`.

        Args:
            inputs: waveforms (B, samples).
            labels: transcripts (B, L), rows of bytes.

        Raises:
            DataError: a transcript is longer than the network can write.
        """
        tokens = self.tokens_of(to_texts(labels)).to(inputs.device)
        logits = self(inputs, decoder_input_ids=tokens[:, :-1]).logits
        targets = tokens[:, 1:].masked_fill(~spoken(tokens, len(self.prompt), self.end), -100)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def tokens_of(self, texts: Sequence[str]) -> Tensor:
        """Prompt, tokens and end of each text, (N, T) int64, filled up with the padding token.

        Raises:
            DataError: a text has more tokens than the network can write, or nothing was learned.
        """
        rows = [[*self.prompt, *self.tokens.encode(text), self.end] for text in texts]
        longest = max(map(len, rows))
        if longest > self.longest:
            raise DataError(
                f"got a transcript of {longest} tokens with prompt and end, expected at most "
                f"{self.longest}; leave it out, or take a network with max_tokens: {longest}"
            )
        filled = [row + [self.pad] * (longest - len(row)) for row in rows]
        return torch.tensor(filled, dtype=torch.int64)

    def transcribe(self, waveforms: Tensor, *, batch_size: int = 32) -> Transcripts:
        """Greedy transcripts; see `core.transcripts.Transcribes`.

        Scores are those of the network itself, before tokens are suppressed, so asking again with
        the written tokens gives the same.

        Args:
            waveforms: (N, samples); batches are moved to the network's device.
            batch_size: recordings at a time; changes no text beyond rounding.

        Returns:
            On the CPU, T the longest that the network can write.
        """
        device = next(self.parameters()).device
        parts: list[tuple[Tensor, ...]] = []
        with torch.no_grad(), evaluating(self):
            for rows in waveforms.split(batch_size):
                parts.append(tuple(one.cpu() for one in self._written(rows.to(device))))
        tokens, log_probs, entropies, written, ended = map(torch.cat, zip(*parts, strict=True))
        start = len(self.prompt)
        texts = [
            self.tokens.decode([token for token in row[start : start + count] if token != self.end])
            for row, count in zip(tokens.tolist(), written.tolist(), strict=True)
        ]
        return Transcripts(texts, tokens, log_probs, entropies, written, ended)

    def _written(self, waveforms: Tensor) -> tuple[Tensor, ...]:
        """Tokens of a batch, their scores, counts and ends; the decoder keeps what it computed."""
        encoded, start, limit = self.encode(waveforms), len(self.prompt), self.longest
        tokens = encoded.new_full((len(encoded), limit), self.pad, dtype=torch.int64)
        tokens[:, :start] = self._prompts(len(encoded), encoded.device)
        log_probs = encoded.new_zeros((len(encoded), limit), dtype=torch.float32)
        entropies, written = torch.zeros_like(log_probs), torch.zeros_like(tokens[:, 0])
        open_ = torch.ones_like(written, dtype=torch.bool)
        latest, past = tokens[:, :start], None
        for place in range(start, limit):
            out = self.network.model.decoder(
                input_ids=latest,
                encoder_hidden_states=encoded,
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            logs = self.network.proj_out(out.last_hidden_state[:, -1]).float().log_softmax(-1)
            chosen = self._allowed(logs, first=place == start).argmax(-1)
            tokens[:, place] = torch.where(open_, chosen, self.pad)
            log_probs[:, place] = logs.gather(1, chosen[:, None])[:, 0] * open_
            entropies[:, place] = torch.special.entr(logs.exp()).sum(-1) * open_
            written += open_
            open_ = open_ & (chosen != self.end)
            latest = tokens[:, place : place + 1]
            # Every token costs a pass; waiting for the device here is cheaper than passes in vain.
            if not bool(open_.any()):
                break
        return tokens, log_probs, entropies, written, ~open_

    def _allowed(self, logs: Tensor, *, first: bool) -> Tensor:
        banned = [*self._suppressed, *(self._suppressed_first if first else ())]
        if not banned:
            return logs
        index = torch.tensor(banned, device=logs.device)
        return logs.index_fill(1, index, -torch.inf)

    def _prompts(self, count: int, device: torch.device) -> Tensor:
        return torch.tensor([self.prompt] * count, dtype=torch.int64, device=device)

    @property
    def tokens(self) -> SpokenTokens:
        """Its tokens.

        Raises:
            DataError: it has learned none.
        """
        if self._tokens is None:
            self._tokens = read_tokens(self.vocabulary)
        if self._tokens is None:
            raise DataError(
                "got a speech recogniser without tokens, expected one that has seen texts; call "
                "learn_vocabulary, or load its weights"
            )
        return self._tokens

    def learn_vocabulary(self, texts: Tensor) -> None:
        """Choose tokens by transcripts (N, L), rows of bytes; see `core.LearnsVocabulary`."""
        learned = OwnTokens.learned(to_texts(texts), self.unit, self.vocab_size)
        self.set_vocabulary(learned.to_json())

    def set_vocabulary(self, text: str) -> None:
        """Take over tokens: what `OwnTokens.to_json` wrote, or a tokenizer.json."""
        self.vocabulary = stored_bytes(text).to(self.vocabulary.device)
        self._tokens = None

    def with_layers(
        self,
        encoder_layers: int | None = None,
        decoder_layers: int | None = None,
        choose: Choice = "spaced",
    ) -> nn.Module:
        """A student of the same widths and tokens that starts from some of the layers.

        Convolutions, embeddings, positions and norms are copied, too. See `core.MakesStudents`.

        Args:
            encoder_layers: of the student; None keeps all.
            decoder_layers: likewise.
            choose: which of them, see `choose_layers`.

        Raises:
            RecipeError: there are not as many, or this network cannot be built again.
        """
        if not self._card:
            raise RecipeError(
                "got a speech recogniser that no name of 'vestige list models' stands for, "
                "expected one that can be built again; hand in a student of your own"
            )
        chosen = {
            "encoder": choose_layers(
                self._count("encoder"), encoder_layers or self._count("encoder"), choose
            ),
            "decoder": choose_layers(
                self._count("decoder"), decoder_layers or self._count("decoder"), choose
            ),
        }
        student = copy.deepcopy(self)
        student.requires_grad_(True)
        for side, layers in chosen.items():
            stack = getattr(student.network.model, side)
            stack.layers = nn.ModuleList(stack.layers[index] for index in layers)
            for index, layer in enumerate(stack.layers):
                _renumber(layer, index)
            setattr(student.network.config, f"{side}_layers", len(layers))
            student._card["args"][f"{side}_layers"] = len(layers)
        student.network.config.num_hidden_layers = len(chosen["encoder"])
        return student.train()

    def network_card(self) -> dict[str, Any]:
        """{"model", "args"} with which `models.factory` builds a network of this shape."""
        return copy.deepcopy(self._card)

    def _count(self, side: str) -> int:
        return len(getattr(self.network.model, side).layers)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        take_sizes(self, state, prefix)
        self._tokens = None
        super()._load_from_state_dict(state, prefix, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        # A tokenizer in Rust cannot be copied, and is read again from its bytes.
        held = {key: value for key, value in self.__dict__.items() if key != "_tokens"}
        made.__dict__.update(copy.deepcopy(held, memo), _tokens=None)
        return made


def spoken(tokens: Tensor, prompt: int, end: int) -> Tensor:
    """Which of the tokens that follow another one are text or its end, (B, T - 1) bool.

    Args:
        tokens: (B, T) int64, all that a decoder read and wrote; what stands behind the end does not
            count, also where the network fills up with the end itself.
        prompt: tokens that all begin with.
        end: number of the token that ends a text.
    """
    targets = tokens[:, 1:]
    ends = (targets == end).long()
    ends[:, : prompt - 1] = 0
    before = ends.cumsum(1) - ends
    counted = before == 0
    counted[:, : prompt - 1] = False
    return counted


def _renumber(layer: nn.Module, index: int) -> None:
    """Tell the attention of a layer its new place, by which a cache finds its keys."""
    for part in layer.modules():
        if isinstance(getattr(part, "layer_idx", None), int):
            part.layer_idx = index  # type: ignore[assignment]
