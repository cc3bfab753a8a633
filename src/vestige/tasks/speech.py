"""Speech recognition: a text per recording, judged by its word error rate."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vestige.core.texts import to_texts
from vestige.core.transcripts import (
    Normalizer,
    Transcribes,
    error_rates,
    normalizer,
    word_error_rates,
)
from vestige.core.types import InputSpec, predict
from vestige.errors import DataError, ShapeError
from vestige.tasks._judging import check_inputs, device_of, quiet

Spoken = tuple[Tensor, Tensor]

_SHOWN = 40


class Speech:
    """The task of writing down what is said.

    Args:
        spec: what one recording looks like.
        num_classes: V, number of the network's tokens.
        normalizer: how texts are made comparable, see `core.transcripts.normalizer`.
    """

    kind = "speech"
    metric = "wer"
    higher_is_better = False

    def __init__(self, spec: InputSpec, num_classes: int, normalizer: Normalizer = "basic") -> None:
        if spec.kind != "audio":
            raise DataError(
                f"got {spec.kind} inputs, expected audio; correct the input of the teacher"
            )
        if num_classes < 2:
            raise DataError(f"got num_classes={num_classes}, expected at least 2 tokens")
        self.spec = spec
        self.num_classes = num_classes
        self.normalizer: Normalizer = normalizer

    def evaluate(self, model: nn.Module, data: Spoken, *, batch_size: int = 64) -> dict[str, float]:
        """Word and character error rate of `model`, over the corpus and as rates: 1 is 100 %.

        Rates can be above 1. References without a word after normalising are left out.

        Args:
            model: transcribes, see `core.transcripts.Transcribes`.
            data: waveforms (N, samples) and transcripts (N, L), rows of bytes.
            batch_size: recordings at a time; changes no result beyond rounding.

        Returns:
            "wer" and "cer".

        Raises:
            ShapeError: inputs do not fit the spec, or `model` does not transcribe.
            DataError: there are no recordings, or not one transcript for each.
        """
        waveforms, texts = self.check_examples(data)
        heard = self._heard(model, waveforms, batch_size)
        rates = error_rates(to_texts(texts), heard, self.normalizer)
        return {"wer": rates.wer, "cer": rates.cer}

    def details(
        self, student: nn.Module, teacher: Any, data: Spoken, *, batch_size: int = 64
    ) -> dict[str, Any]:
        """What `evaluation.json` says: rates of both, and what was heard, the worst first.

        Returns:
            Plain lists and numbers: "inputs", N; "words", of the references; "skipped", references
            without a word; "normalizer"; "student" and "teacher", each with "wer", "cer" and
            "exact", the share of recordings without an error, the teacher's None where it was not
            asked; "same_text", the share of recordings of which both write the same, or None;
            "utterances", at most 40, the student's worst first: "truth", "student", "teacher" and
            the "wer" of each.
        """
        waveforms, rows = self.check_examples(data)
        said = to_texts(rows)
        heard = {"student": self._heard(student, waveforms, batch_size)}
        if isinstance(teacher, Transcribes):
            heard["teacher"] = self._heard(teacher, waveforms, batch_size)
        normal = normalizer(self.normalizer)
        rates = {who: error_rates(said, texts, self.normalizer) for who, texts in heard.items()}
        each = {who: word_error_rates(said, texts, normal) for who, texts in heard.items()}
        scores = {
            who: {
                "wer": rates[who].wer,
                "cer": rates[who].cer,
                "exact": sum(rate == 0 for rate in each[who])
                / max(1, sum(rate is not None for rate in each[who])),
            }
            for who in heard
        }
        same = (
            [normal(one) == normal(two) for one, two in zip(*heard.values(), strict=True)]
            if (len(heard) == 2)
            else []
        )
        worst = sorted(range(len(said)), key=lambda row: -_rank(each["student"][row]))[:_SHOWN]
        return {
            "inputs": len(said),
            "words": rates["student"].words,
            "skipped": rates["student"].skipped,
            "normalizer": self.normalizer,
            "student": scores["student"],
            "teacher": scores.get("teacher"),
            "same_text": sum(same) / len(same) if same else None,
            "utterances": [
                {
                    "truth": said[row],
                    **{who: texts[row] for who, texts in heard.items()},
                    **{f"{who}_wer": rates_of[row] for who, rates_of in each.items()},
                }
                for row in worst
            ],
        }

    def check(self, model: nn.Module) -> None:
        """Ask `model` for two recordings of silence, in eval mode, and look at the answer.

        Raises:
            ShapeError: it does not transcribe, cannot take the spec's inputs, or has another number
                of tokens.
        """
        self._check_transcribes(model)
        silence = torch.zeros((2, *self.spec.shape))
        with quiet(model):
            try:
                logits = predict(model, silence.to(device_of(model, silence))).logits
            except (RuntimeError, ValueError) as error:
                if isinstance(error, ShapeError):
                    raise
                raise ShapeError(
                    f"{type(model).__name__} cannot take recordings of shape {self.spec.shape}, as "
                    f"the input spec says: {error}"
                ) from error
        if logits.dim() != 3 or logits.shape[2] != self.num_classes:
            raise ShapeError(
                f"got logits of shape {tuple(logits.shape)} from {type(model).__name__}, expected "
                f"(2, tokens, {self.num_classes}); set num_classes to the network's tokens"
            )

    def check_examples(self, data: Spoken) -> Spoken:
        """What `evaluate` and a training take, looked at.

        Raises:
            ShapeError: recordings do not fit the spec.
            DataError: there are none, or not one transcript for each.
        """
        waveforms, texts = data
        check_inputs(waveforms, self.spec)
        if texts.dtype != torch.uint8 or texts.dim() != 2 or len(texts) != len(waveforms):
            raise DataError(
                f"got transcripts of shape {tuple(texts.shape)} and dtype {texts.dtype} for "
                f"{len(waveforms)} recordings, expected a row of bytes for each; make them with "
                "vestige.core.texts.to_bytes"
            )
        return waveforms, texts

    def _heard(self, model: Any, waveforms: Tensor, batch_size: int) -> list[str]:
        self._check_transcribes(model)
        with quiet(model):
            texts: list[str] = model.transcribe(waveforms, batch_size=batch_size).texts
        return texts

    def _check_transcribes(self, model: Any) -> None:
        if not isinstance(model, Transcribes):
            raise ShapeError(
                f"got {type(model).__name__}, which does not transcribe, expected a network with "
                "transcribe(waveforms, batch_size=...); see vestige.core.transcripts.Transcribes"
            )


def _rank(rate: float | None) -> float:
    """For the order: what cannot be judged comes last."""
    return -math.inf if rate is None else rate
