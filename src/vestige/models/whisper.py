"""Speech recognisers by a few sizes, or as a published network is described."""

from collections.abc import Mapping
from typing import Any

from vestige.core.types import InputSpec
from vestige.models.speech import SpeechRecognizer
from vestige.models.spoken_tokens import END, PAD, START, Unit


def whisper(
    spec: InputSpec,
    num_classes: int,
    *,
    width: int = 64,
    encoder_layers: int = 2,
    decoder_layers: int = 2,
    heads: int = 2,
    ffn: int = 0,
    mel_bins: int = 40,
    hop_samples: int = 80,
    n_fft: int = 256,
    max_tokens: int = 16,
    unit: Unit = "words",
    dropout: float = 0.0,
    published: Mapping[str, Any] | None = None,
) -> SpeechRecognizer:
    """A speech recogniser from nothing, of Whisper's shape; it must learn its tokens first.

    Args:
        spec: of the recordings; its samples are the longest that it hears.
        num_classes: V, tokens: 4 special ones, and as many units as there is room for.
        width: of both stacks; divisible by `heads`.
        encoder_layers: of the encoder.
        decoder_layers: of the decoder.
        heads: of every attention.
        ffn: hidden width of every feed-forward; 0 is four times `width`.
        mel_bins: of the front end.
        hop_samples: between two frames; the encoder sees every second of them.
        n_fft: samples of a frame.
        max_tokens: longest transcript with start and end.
        unit: what a token is: "words" for few different ones, else "characters".
        dropout: of all layers.
        published: of a published network, all arguments of `SpeechRecognizer` but the layers;
            where it is given nothing but the layers counts besides.
    """
    layers = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    if published is not None:
        whisper_args = {**published["whisper"], **layers}
        card = {"model": "whisper", "args": {**layers, "published": dict(published)}}
        return SpeechRecognizer(**{**published, "whisper": whisper_args}, card=card)
    sample_rate_hz = spec.sample_rate_hz
    positions = -(-spec.shape[0] // (2 * hop_samples))
    args = {
        "width": width,
        **layers,
        "heads": heads,
        "ffn": ffn,
        "mel_bins": mel_bins,
        "hop_samples": hop_samples,
        "n_fft": n_fft,
        "max_tokens": max_tokens,
        "unit": unit,
        "dropout": dropout,
    }
    return SpeechRecognizer(
        sample_rate_hz,
        positions * 2 * hop_samples,
        {
            "vocab_size": num_classes,
            "d_model": width,
            **layers,
            "encoder_attention_heads": heads,
            "decoder_attention_heads": heads,
            "encoder_ffn_dim": ffn or 4 * width,
            "decoder_ffn_dim": ffn or 4 * width,
            "num_mel_bins": mel_bins,
            "max_source_positions": positions,
            "max_target_positions": max_tokens,
            "pad_token_id": PAD,
            "bos_token_id": START,
            "eos_token_id": END,
            "decoder_start_token_id": START,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
            "dropout": dropout,
        },
        hop_samples=hop_samples,
        n_fft=n_fft,
        highest_hz=min(8000.0, sample_rate_hz / 2),
        unit=unit,
        suppressed=(PAD, START),
        card={"model": "whisper", "args": args},
    )
