"""Transformers that classify texts, with their tokenizer inside, and students made of them."""

import inspect
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from vestige.core.texts import as_pair, to_texts
from vestige.core.types import Prediction
from vestige.errors import ContractError, RecipeError, ShapeError
from vestige.models.huggingface import need_transformers
from vestige.models.layer_choice import Choice, choose_layers
from vestige.models.sizes import take_sizes
from vestige.models.text_files import save_transformers
from vestige.models.text_students import inherited, narrower
from vestige.models.word_pieces import SPECIAL, train_wordpiece

Start = Literal["layers", "embeddings"]


class TextClassifier(nn.Module):
    """A sequence classifier of transformers that takes texts, tokens or word embeddings.

    The tokenizer is a buffer, so that weights and tokenizer are one file.

    Attributes:
        network: any `...ForSequenceClassification` of transformers.
        tokens: most tokens of an input, special ones included; longer texts are cut.
        embeddings: of words, (V, d), the space that `inputs_embeds` is in. The network's own, or
            that of a wider network this one was made of, which `projection` leads into its own.
        projection: (d to the network's width), without bias, or None.
        special_ids: (4,) int64, numbers of the tokens that begin a text, end it, fill it up and
            mask a word; -1 for what the tokenizer has not.
    """

    sized_by_state = ("tokenizer",)
    tokenizer: Tensor
    special_ids: Tensor

    def __init__(
        self, network: nn.Module, *, tokens: int, embedding_width: int | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.tokens = tokens
        own: nn.Embedding = cast(Any, network).get_input_embeddings()
        self.projection: nn.Linear | None = None
        self.wide: nn.Embedding | None = None
        if embedding_width is not None:
            self.wide = nn.Embedding(own.num_embeddings, embedding_width)
            self.projection = nn.Linear(embedding_width, own.embedding_dim, bias=False)
        self.register_buffer("tokenizer", torch.zeros(0, dtype=torch.uint8))
        self.register_buffer("special_ids", torch.full((len(SPECIAL),), -1))
        self._read: Any = None

    @property
    def embeddings(self) -> nn.Embedding:
        """Where `inputs_embeds` come from."""
        own: nn.Embedding = cast(Any, self.network).get_input_embeddings()
        return own if self.wide is None else self.wide

    @property
    def table(self) -> Tensor:
        """Embeddings of the tokens that the tokenizer knows, (at most V, d), without gradient."""
        return self.embeddings.weight.detach()[: self._reader().get_vocab_size()]

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return int(cast(Any, self.network).config.hidden_size)

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the encoder; the last one's output is the last hidden state.

        Raises:
            RecipeError: they cannot be told apart from what else the network holds.
        """
        count = int(cast(Any, self.network).config.num_hidden_layers)
        found = [
            one
            for one in self.network.modules()
            if isinstance(one, nn.ModuleList) and len(one) == count
        ]
        if len(found) != 1:
            raise RecipeError(
                f"got a {type(self.network).__name__} in which {len(found)} lists have the "
                f"{count} layers of its encoder, expected one; use another network"
            )
        return found[0]

    def forward(
        self,
        rows: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, K), float32 or what the network computes in.

        Args:
            rows: texts, (B, L) uint8, see `core.texts`; nothing else is then given.
            input_ids: (B, l) int64; or
            inputs_embeds: (B, l, d), of `embeddings` before positions, segments and LayerNorm;
                gradient flows to them.
            attention_mask: (B, l), 1 for tokens and 0 for what fills up; None is all ones.
            token_type_ids: (B, l), 1 for the second text of a pair; None is all zeros.

        Raises:
            ShapeError: not exactly one of the three inputs.
        """
        if sum(one is not None for one in (rows, input_ids, inputs_embeds)) != 1:
            raise ShapeError(
                "got none or several of rows, input_ids and inputs_embeds, expected one of them"
            )
        if rows is not None:
            device = self.embeddings.weight.device
            encoded = {name: one.to(device) for name, one in self.encode(rows).items()}
            return self.forward(**encoded)
        if self.projection is not None:
            embeds = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
            input_ids, inputs_embeds = None, self.projection(embeds)
        named = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
        }
        given = {name: one for name, one in named.items() if one is not None}
        return Prediction.of(self.network(**given)).logits

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """Tokens of texts (B, L) as the forward takes them, on the CPU.

        Returns:
            input_ids, attention_mask and, if the network takes them, token_type_ids, each (B, l)
            int64 with l at most `tokens`, filled up on the right.

        Raises:
            ContractError: there is no tokenizer yet.
        """
        texts = [as_pair(text) for text in to_texts(rows)]
        reader = self._reader()
        found = reader.encode_batch(
            [first if second is None else (first, second) for first, second in texts]
        )
        encoded = {
            "input_ids": torch.tensor([one.ids for one in found]),
            "attention_mask": torch.tensor([one.attention_mask for one in found]),
        }
        if "token_type_ids" in inspect.signature(self.network.forward).parameters:
            encoded["token_type_ids"] = torch.tensor([one.type_ids for one in found])
        return encoded

    def words(self, ids: Tensor) -> list[str]:
        """Tokens by their numbers (n,)."""
        reader = self._reader()
        return [str(reader.id_to_token(number)) for number in ids.tolist()]

    def learn_vocabulary(self, rows: Tensor) -> None:
        """Train a lower-casing WordPiece tokenizer of the network's size on texts (N, L).

        It begins a text with [CLS] and ends it, and the second one of a pair, with [SEP].
        """
        texts = [part for text in to_texts(rows) for part in as_pair(text) if part]
        described, special = train_wordpiece(texts, self.embeddings.num_embeddings)
        self.keep_tokenizer(described, **special)

    def keep_tokenizer(self, described: str, **special: int | None) -> None:
        """Take over a tokenizer.

        Args:
            described: the contents of a tokenizer.json.
            **special: numbers of the tokens `SPECIAL`; None or absent where there is none.
        """
        device = self.tokenizer.device
        raw = bytearray(json.dumps(json.loads(described), ensure_ascii=False).encode())
        self.tokenizer = torch.frombuffer(raw, dtype=torch.uint8).clone().to(device)
        numbers = [special.get(role) for role in SPECIAL]
        self.special_ids = torch.tensor(
            [-1 if number is None else number for number in numbers], device=device
        )
        self._read = None

    def described_tokenizer(self) -> str:
        """The contents of its tokenizer.json.

        Raises:
            ContractError: there is no tokenizer yet.
        """
        if not len(self.tokenizer):
            raise ContractError(
                f"a {type(self.network).__name__} without a tokenizer was asked about texts; call "
                "learn_vocabulary or load weights first"
            )
        return bytes(self.tokenizer.cpu().numpy()).decode()

    def with_layers(
        self,
        *,
        layers: int,
        choose: Choice = "spaced",
        start: Start = "layers",
        width: int | None = None,
        heads: int | None = None,
        feed_forward: int | None = None,
    ) -> "TextClassifier":
        """A shallower student of the same kind, see `core.protocols.MakesStudents`.

        Args:
            layers: of its encoder.
            choose: which of this network's layers they start from, see `choose_layers`.
            start: "layers" copies these, the embeddings, the pooler and the classifier;
                "embeddings" copies the embeddings alone, and the rest is drawn anew.
            width: of a narrower student, which keeps this network's embeddings of words behind a
                `projection`, and whose other weights are drawn anew; None keeps the width.
            heads: of attention, for a narrower student; None keeps the width of a head.
            feed_forward: width of its hidden layers in between; None keeps the proportion.

        Raises:
            RecipeError: more layers than this network has, or settings that do not fit.
        """
        chosen = choose_layers(len(self.layers), layers, choose)
        if start not in get_args(Start):
            raise RecipeError(f"got start={start!r}, expected 'layers' or 'embeddings'; correct it")
        if width is not None and choose != "spaced":
            raise RecipeError(
                f"got choose={choose!r} with width={width}, expected no choice, since a student of "
                "another width starts from no layer; leave choose or width out"
            )
        known = cast(Any, self.network).config
        changes = {"num_hidden_layers": layers, **narrower(known, width, heads, feed_forward)}
        config = deepcopy(known)
        for name, value in changes.items():
            setattr(config, name, value)
        inner = self.embeddings.embedding_dim
        try:
            made = TextClassifier(
                type(self.network)(config),
                tokens=self.tokens,
                embedding_width=inner if width is not None or self.wide is not None else None,
            )
        except ValueError as error:
            raise RecipeError(f"got {changes} for a student, which do not fit: {error}") from error
        made.keep_tokenizer(
            self.described_tokenizer(), **dict(zip(SPECIAL, self.special_ids.tolist(), strict=True))
        )
        if width is not None:
            found = {"wide.weight": self.embeddings.weight}
        else:
            found = inherited(self, chosen, embeddings_only=start == "embeddings")
        made.load_state_dict({**made.state_dict(), **found})
        return made.to(self.embeddings.weight.device)

    def network_card(self) -> dict[str, Any]:
        """Name and arguments for `models.factory.build_model`."""
        config = cast(Any, self.network).config
        described = json.loads(config.to_json_string(use_diff=True))
        # Of the file it came from, and nothing that a network is built of.
        for key in ("_name_or_path", "transformers_version", "architectures", "dtype"):
            described.pop(key, None)
        args: dict[str, Any] = {"config": described, "tokens": self.tokens}
        if self.wide is not None:
            args["embedding_width"] = self.wide.embedding_dim
        return {"model": "transformer", "args": args}

    def save_transformers(self, folder: Path, classes: Sequence[str] = ()) -> None:
        """Write a folder that transformers opens by itself, see `text_files.save_transformers`."""
        save_transformers(self, folder, classes)

    def _reader(self) -> Any:
        if self._read is None:
            from tokenizers import Tokenizer

            self._read = Tokenizer.from_str(self.described_tokenizer())
            self._read.enable_truncation(self.tokens)
            pad = int(self.special_ids[SPECIAL.index("pad")])
            self._read.enable_padding(pad_id=max(pad, 0))
        return self._read

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        take_sizes(self, state, prefix)
        self._read = None
        super()._load_from_state_dict(cast(Any, state), prefix, *rest)


def bert(
    num_classes: int,
    *,
    layers: int = 3,
    width: int = 64,
    heads: int = 2,
    feed_forward: int | None = None,
    vocabulary: int = 4000,
    tokens: int = 48,
    dropout: float = 0.1,
) -> TextClassifier:
    """A BERT of any size with a vocabulary that it is still to learn.

    Args:
        num_classes: K.
        layers: of the encoder.
        width: d, of the hidden states.
        heads: of attention; divide the width.
        feed_forward: width of the hidden layer in between; None is 4 d.
        vocabulary: word pieces, V.
        tokens: most tokens of an input.
        dropout: of hidden states and attention.
    """
    config = {
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": feed_forward or 4 * width,
        "max_position_embeddings": tokens,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    return transformer(num_classes, config=config, tokens=tokens)


def transformer(
    num_classes: int,
    *,
    config: Mapping[str, Any],
    tokens: int,
    embedding_width: int | None = None,
) -> TextClassifier:
    """The sequence classifier of transformers that a configuration describes, freshly drawn.

    Args:
        num_classes: K.
        config: what a config.json says, "model_type" among it.
        tokens: most tokens of an input.
        embedding_width: of the words' embeddings, where they lead into a narrower network.

    Raises:
        MissingExtraError: transformers is not installed.
        RecipeError: transformers has no such classifier.
    """
    need_transformers("a transformer for texts")
    from transformers import AutoConfig, AutoModelForSequenceClassification

    given = dict(config)
    labels = {} if len(given.get("id2label") or {}) == num_classes else {"num_labels": num_classes}
    try:
        described = AutoConfig.for_model(given.pop("model_type", ""), **{**given, **labels})
        network = AutoModelForSequenceClassification.from_config(described)
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"got the configuration {dict(config)!r}, of which transformers makes no sequence "
            f"classifier: {error}; correct it"
        ) from error
    return TextClassifier(network, tokens=tokens, embedding_width=embedding_width)
