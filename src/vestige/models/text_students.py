"""What a student made of a transformer for texts keeps of it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vestige.errors import RecipeError


def narrower(
    config: Any, width: int | None, heads: int | None, feed_forward: int | None
) -> dict[str, int]:
    """What changes in the configuration of a narrower network.

    Args:
        config: of the network, of transformers.
        width: of the hidden states; None keeps it, and then nothing changes.
        heads: of attention; None keeps the width of a head.
        feed_forward: width of the hidden layers in between; None keeps the proportion.

    Raises:
        RecipeError: heads or feed_forward without a width.
    """
    if width is None:
        if heads or feed_forward:
            raise RecipeError(
                f"got heads={heads} and feed_forward={feed_forward} without width, expected them "
                "with it; give a width, or leave them out"
            )
        return {}
    # Under this name DistilBERT has the width in between, and others have none.
    inner = "hidden_dim" if hasattr(config, "hidden_dim") else "intermediate_size"
    proportion = getattr(config, inner) / config.hidden_size
    kept = max(1, width * config.num_attention_heads // config.hidden_size)
    return {
        "hidden_size": width,
        "num_attention_heads": heads or kept,
        inner: feed_forward or round(width * proportion),
    }


def inherited(
    teacher: Any, chosen: Sequence[int], *, embeddings_only: bool = False
) -> dict[str, Tensor]:
    """The weights of a network that a shallower one of its width starts from, by their names there.

    Args:
        teacher: a `models.text.TextClassifier`.
        chosen: numbers of its layers, in order.
        embeddings_only: leave out layers, pooler and classifier.
    """
    names = {id(one): name for name, one in teacher.named_modules()}
    listed = f"{names[id(teacher.layers)]}."
    own: nn.Embedding = teacher.network.get_input_embeddings()
    block = names[id(own)].rpartition(".")[0] + "."
    found: dict[str, Tensor] = {}
    for name, value in teacher.state_dict().items():
        if name.startswith((block, "wide.", "projection.")):
            found[name] = value
        elif embeddings_only:
            continue
        elif name.startswith(listed):
            number, _, rest = name.removeprefix(listed).partition(".")
            if int(number) in chosen:
                found[f"{listed}{chosen.index(int(number))}.{rest}"] = value
        else:
            found[name] = value
    return found
