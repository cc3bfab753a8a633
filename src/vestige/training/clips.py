"""Recordings as WAV, small enough to stand inside a page."""

import base64
import io
import wave

from torch import Tensor


def wave_bytes(samples: Tensor, sample_rate_hz: int) -> bytes:
    """A 16-bit mono WAV file of `samples` (n,) in [-1, 1], without the silence behind them."""
    values = samples.detach().float().cpu()
    sounding = values.nonzero()
    last = int(sounding[-1]) + 1 if len(sounding) else 1
    data = (values[:last].clamp(-1, 1) * 32767).round().short().numpy()
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        file.writeframes(data.astype("<i2").tobytes())
    return written.getvalue()


def wave_base64(samples: Tensor, sample_rate_hz: int) -> str:
    """The same in base64."""
    return base64.b64encode(wave_bytes(samples, sample_rate_hz)).decode("ascii")
