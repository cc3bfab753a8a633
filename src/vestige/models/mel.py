"""Log-mel spectrograms as Whisper takes them, in torch and without torchaudio."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.errors import MissingExtraError, ShapeError


class LogMel(nn.Module):
    """From waveforms to log-mel features; equal to WhisperFeatureExtractor up to rounding.

    A Hann window, power, slaney mel filters, log10, cut 8 below the loudest value of each
    recording, then (x + 4) / 4. Holds no weights; its filters are not part of a state dict.

    Args:
        sample_rate_hz: of the waveforms.
        window_samples: length that recordings are filled up to with zeros; a multiple of
            `hop_samples`.
        mel_bins: M.
        hop_samples: from one frame to the next.
        n_fft: samples of a frame.
        highest_hz: upper edge of the last filter. Whisper's is 8000.

    Raises:
        MissingExtraError: transformers is not installed.
    """

    filters: Tensor
    hann: Tensor

    def __init__(
        self,
        sample_rate_hz: int,
        window_samples: int,
        *,
        mel_bins: int = 80,
        hop_samples: int = 160,
        n_fft: int = 400,
        highest_hz: float = 8000.0,
    ) -> None:
        super().__init__()
        self.window_samples, self.hop_samples, self.n_fft = window_samples, hop_samples, n_fft
        filters = _filters()(
            num_frequency_bins=1 + n_fft // 2,
            num_mel_filters=mel_bins,
            min_frequency=0.0,
            max_frequency=highest_hz,
            sampling_rate=sample_rate_hz,
            norm="slaney",
            mel_scale="slaney",
        )
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)
        self.register_buffer("hann", torch.hann_window(n_fft), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Features (B, M, window / hop) float32 of waveforms (B, samples) in [-1, 1].

        Raises:
            ShapeError: not two dimensions, or longer than the window.
        """
        if waveforms.dim() != 2 or waveforms.shape[1] > self.window_samples:
            raise ShapeError(
                f"got waveforms of shape {tuple(waveforms.shape)}, expected (B, samples) with at "
                f"most {self.window_samples} samples; cut them, or take a network with a longer "
                "window"
            )
        # Half precision has too few bits for powers that span eight decades.
        with torch.autocast(waveforms.device.type, enabled=False):
            filled = functional.pad(
                waveforms.float(), (0, self.window_samples - waveforms.shape[1])
            )
            spectrum = torch.stft(
                filled, self.n_fft, self.hop_samples, window=self.hann, return_complex=True
            )
            power = spectrum[..., :-1].abs().square()
            loud = (self.filters.T @ power).clamp_min(1e-10).log10()
            loud = torch.maximum(loud, loud.amax((1, 2), keepdim=True) - 8.0)
            return (loud + 4.0) / 4.0


def _filters() -> Any:
    try:
        from transformers.audio_utils import mel_filter_bank
    except ImportError as error:
        raise MissingExtraError(
            "mel filters need transformers, which is not installed; pip install 'vestige[speech]'"
        ) from error
    return mel_filter_bank
