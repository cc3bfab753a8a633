"""WordPiece learned from texts, the same every time."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vestige.errors import RecipeError

# The roles that a network of texts knows, in the order of its `special_ids`.
SPECIAL = ("cls", "sep", "pad", "mask")
_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# As many characters as the trainer of tokenizers keeps.
_ALPHABET = 1000


def learn_word_pieces(
    texts: Sequence[str], size: int, tokens: Sequence[str]
) -> tuple[str, dict[str, int]]:
    """A lower-casing WordPiece tokenizer as BERT has it.

    It begins a text with [CLS] and ends it, and the second one of a pair, with [SEP].

    Args:
        texts: to learn from; their order does not matter.
        size: kinds of tokens at most, `tokens` included.
        tokens: special ones, in the order of their numbers; "[CLS]" and "[SEP]" among them.

    Returns:
        The contents of a tokenizer.json, and the number of each token.

    Raises:
        RecipeError: the letters of the texts alone are more than `size`.
    """
    from tokenizers import BertWordPieceTokenizer
    from tokenizers.processors import TemplateProcessing

    trained = BertWordPieceTokenizer(lowercase=True)
    letters, later = _letters(trained, texts)
    trained.train_from_iterator(
        texts,
        vocab_size=size,
        # Which of two pieces that are equally frequent comes first goes by the numbers of their
        # letters, which the trainer gives by chance unless they are there before it starts.
        special_tokens=[*tokens, *later],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    words = [*tokens, *sorted(set(trained.get_vocab()) - set(tokens))]
    if len(words) > size:
        raise RecipeError(
            f"got a vocabulary of {size}, expected at least {len(words)}: so many letters, at the "
            "beginning of words and within, have the texts; raise it"
        )
    numbers = {word: number for number, word in enumerate(words)}
    reader: Any = BertWordPieceTokenizer(vocab=numbers, lowercase=True)._tokenizer
    # Without it no special tokens are added to a pair as BERT has them, or to any text at all.
    reader.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, numbers[token]) for token in ("[CLS]", "[SEP]")],
    )
    return reader.to_str(), numbers


def train_wordpiece(texts: Sequence[str], size: int) -> tuple[str, dict[str, int]]:
    """A tokenizer of `learn_word_pieces` with BERT's special tokens.

    Args:
        texts: to learn from.
        size: kinds of tokens at most; few texts give fewer.

    Returns:
        The contents of its tokenizer.json, and the numbers of the tokens in `SPECIAL`.
    """
    described, numbers = learn_word_pieces(texts, size, _TOKENS)
    return described, {role: numbers[f"[{role.upper()}]"] for role in SPECIAL}


def _letters(reader: Any, texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The most frequent letters, and those of them that stand within words, as pieces of these."""
    words: Counter[str] = Counter()
    for text in texts:
        found = reader.pre_tokenizer.pre_tokenize_str(reader.normalizer.normalize_str(text))
        words.update(word for word, _ in found)
    counts: Counter[str] = Counter()
    for word, times in words.items():
        for letter in word:
            counts[letter] += times
    kept = sorted(counts, key=lambda letter: (-counts[letter], letter))[:_ALPHABET]
    within = {letter for word in words for letter in word[1:]}
    return sorted(kept), [f"##{letter}" for letter in sorted(within & set(kept))]
