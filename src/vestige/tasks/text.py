"""Texts with one label each, alone or in pairs, judged by accuracy."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.core.texts import PAIR, as_pair, to_bytes, to_texts
from vestige.core.types import Inputs, InputSpec
from vestige.errors import ShapeError
from vestige.tasks._judging import check_answers
from vestige.tasks.classification import Classification, Labelled

_SHOWN = 12
_PROBES = ("a", "some words in a row")


class Text(Classification):
    """The task of naming the class of a text; see `Classification` for how it is judged.

    Args:
        spec: of texts, rows of bytes, see `core.texts`.
        num_classes: number of classes K; labels are in [0, K).

    Raises:
        ShapeError: the spec is none of texts.
    """

    kind = "text"

    def __init__(self, spec: InputSpec, num_classes: int) -> None:
        if spec.kind != "text" or len(spec.shape) != 1:
            raise ShapeError(
                f"got {spec.kind} inputs of shape {spec.shape} for texts, expected kind 'text' and "
                "shape (bytes,); make the spec with InputSpec.text"
            )
        super().__init__(spec, num_classes)

    def check(self, model: nn.Module) -> None:
        """Ask `model` for two short texts, in eval mode, and look at the answer.

        Raises:
            ShapeError: it cannot take texts, or its logits are not (2, K).
            TeacherError: its logits are not finite.
        """
        check_answers(model, self.spec, self._logits, inputs=to_bytes(_PROBES, self.spec.shape[0]))

    def readings(self, inputs: Inputs, teacher: Any) -> list[str]:
        """Texts as they are; of embeddings the token that is nearest to each word.

        Pieces of words ("##ing") are joined to what stands before them; special tokens are left
        out.
        """
        if isinstance(inputs, Tensor):
            return [text.replace(PAIR, " | ") for text in to_texts(inputs)]
        mask = inputs["attention_mask"].bool()
        ids = inputs.get("input_ids")
        if ids is None:
            ids = nearest_words(inputs["inputs_embeds"], teacher)
        ids = ids.long().cpu()
        shown = mask.cpu() & ~torch.isin(ids, teacher.special_ids.cpu())
        return [
            " ".join(teacher.words(row[kept])).replace(" ##", "")
            for row, kept in zip(ids, shown, strict=True)
        ]

    def details(
        self, student: nn.Module, teacher: Any, data: Labelled, *, batch_size: int = 512
    ) -> dict[str, Any]:
        """As for `Classification`, and "texts": up to 12 that the student gets wrong.

        Each has "text", the classes "truth" and "student", and "teacher", None where it was not
        asked; those that the teacher gets right come first.
        """
        told = super().details(student, teacher, data, batch_size=batch_size)
        inputs, labels = self.check_examples(data)
        labels = labels.cpu()
        found = self._answers(student, inputs, batch_size)
        taught = None if teacher is None else self._answers(teacher, inputs, batch_size)
        wrong = (found != labels).nonzero()[:, 0]
        if taught is not None:
            order = (taught[wrong] != labels[wrong]).to(torch.int8).argsort(stable=True)
            wrong = wrong[order]
        wrong = wrong[:_SHOWN]
        shown = to_texts(inputs[wrong.to(inputs.device)])
        return {
            **told,
            "texts": [
                _told(text, int(labels[row]), int(found[row]), taught, int(row))
                for text, row in zip(shown, wrong.tolist(), strict=True)
            ],
        }


def nearest_words(words: Tensor, reader: Any, *, rows: int = 64) -> Tensor:
    """Numbers of the tokens whose embeddings point the same way as `words` most (cosine).

    Args:
        words: (N, l, d).
        reader: a network with a `table` of the tokens' embeddings.
        rows: texts at a time; bounds the memory, changes nothing.

    Returns:
        (N, l) int64, on the CPU.
    """
    table = functional.normalize(reader.table.float(), dim=1)
    parts = [
        (functional.normalize(part.to(table), dim=2) @ table.T).argmax(2).cpu()
        for part in words.float().split(rows)
    ]
    return torch.cat(parts)


def _told(
    text: str, truth: int, student: int, taught: Tensor | None, row: int
) -> Mapping[str, Any]:
    first, second = as_pair(text)
    return {
        "text": first if second is None else f"{first} | {second}",
        "truth": truth,
        "student": student,
        "teacher": None if taught is None else int(taught[row]),
    }
