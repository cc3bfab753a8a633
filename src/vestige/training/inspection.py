"""Tell before the first step whether the inputs are normalised as the teacher expects.

A teacher that is asked in another normalisation still answers, only worse, so nothing fails and the
student learns the wrong thing. Three facts are looked at, without a step: what the teacher's first
BatchNorm remembers of its training inputs, what range the evaluation inputs have, and how the
teacher scores on them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vestige.core import modes, seeding
from vestige.core.protocols import Task
from vestige.core.types import InputSpec, predict
from vestige.training.diagnosis import Finding

# Neighbouring pixels of images go together; how closely is fitted, within what images show.
_CORRELATIONS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
# Set on teachers of digits, MNIST, Fashion-MNIST and CIFAR-10 in both normalisations, see
# tests/training/test_inspection.py. A set of values in [0, 1] has a deviation of at most 0.5.
_RAW_STD, _RAW_LOW, _BYTES_STD = 0.62, -0.25, 8.0
_ROOM, _RAW_ERROR = 1.4, 0.1
_FEW_CHANNELS = 4
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Remembered:
    """Mean and deviation of the inputs that a network was trained on, as it remembers them.

    Attributes:
        mean: per channel, (C,).
        std: one number for all channels.
    """

    mean: Tensor
    std: float


@torch.no_grad()
def remembered(network: nn.Module, spec: InputSpec) -> Remembered | None:
    """What the first BatchNorm of `network` says about the inputs it was trained on.

    One forward in eval mode. Where the BatchNorm reads the input itself, its statistics are the
    answer. Where it reads the first convolution, the mean of each output channel is the sum of the
    kernel times the mean of the inputs (borders aside), which is solved for the mean; the variance
    depends on how closely neighbouring pixels go together, which is fitted along with the
    deviation. That is a rough estimate: good for a factor of 2, not for 20 %.

    Returns:
        None where nothing can be said: no BatchNorm near the input, inputs that are no images, a
        network that changes its inputs first, one that was never trained, or too few channels.
    """
    if spec.kind != "image" or len(spec.shape) != 3:
        return None
    first = _first_layers(network, spec)
    if first is None:
        return None
    convolution, norm = first
    if norm.running_mean is None or norm.running_var is None:
        return None
    mean, var = norm.running_mean.double().cpu(), norm.running_var.double().cpu()
    if not mean.any() and bool((var == 1).all()):
        return None  # as made: it has never seen a batch
    if convolution is None:
        return Remembered(mean, float(var.mean().clamp_min(0).sqrt()))
    weight = convolution.weight.detach().double().cpu()
    if convolution.groups != 1 or len(weight) < _FEW_CHANNELS:
        return None
    if convolution.bias is not None:
        mean = mean - convolution.bias.detach().double().cpu()
    alive = var > 1e-6 * var.max()
    if int(alive.sum()) < max(_FEW_CHANNELS, weight.shape[1] + 1):
        return None
    weight, mean, var = weight[alive], mean[alive], var[alive]
    std = _fitted_std(weight, var)
    # A channel with much variance says less about the mean.
    sums = weight.sum((2, 3)) / var.sqrt()[:, None]
    solved = torch.linalg.lstsq(sums, (mean / var.sqrt())[:, None]).solution[:, 0]
    return Remembered(solved, std)


def notices(
    networks: Sequence[nn.Module],
    task: Task,
    inputs: Tensor | None = None,
    score: float | None = None,
) -> list[Finding]:
    """All that can be told before the first step.

    Args:
        networks: teachers that can be looked into.
        task: with the spec of their inputs and the number of classes.
        inputs: that the student is judged on, or None.
        score: of the first teacher on these, in the task's metric.
    """
    found = [check_remembered(network, task.spec) for network in networks]
    if inputs is not None:
        found.append(check_inputs(inputs, task.spec))
    if score is not None and task.metric == "accuracy" and len(networks) == 1:
        found.append(check_score(score, task.num_classes))
    return [finding for finding in found if finding is not None]


def check_remembered(network: nn.Module, spec: InputSpec) -> Finding | None:
    """Whether the spec's normalisation is the one that `network` was trained in.

    Limits: networks without BatchNorm near the input are not judged; images with little contrast
    look normalised less than they are; and only [0, 1] (or bytes) against normalised inputs can be
    told, not one mean from a similar one.

    Returns:
        A finding with the code "normalisation", or None.
    """
    known = remembered(network, spec)
    if known is None or not math.isfinite(known.std):
        return None
    mean = float(known.mean.mean())
    seen = f"mean {mean:.2g} and deviation {known.std:.2g}"
    if not spec.mean:
        if known.std > _BYTES_STD:
            return _finding(
                f"the teacher's first BatchNorm speaks of inputs with {seen}, such as bytes from 0 "
                "to 255, and the input spec says values in [0, 1]",
                "say so in the spec: mean 0 and std 1/255 per channel turn [0, 1] into bytes",
            )
        # Values in [0, 1] of that mean deviate by `most` at most; with room, as both are estimates.
        most = math.sqrt(max(0.0, mean * (1 - mean))) if mean < 1 else 0.0
        if known.std > min(_RAW_STD, _ROOM * most + _RAW_ERROR) or mean < _RAW_LOW:
            return _finding(
                f"the teacher's first BatchNorm speaks of normalised inputs ({seen}), and the "
                "input spec has no mean and std",
                "give the mean and std that the teacher was trained with",
            )
        return None
    raw = _distance(known, spec.mean, spec.std)
    normalised = _distance(known, (0.0,) * len(spec.mean), (1.0,) * len(spec.mean))
    if raw < normalised and known.std < _RAW_STD and mean > _RAW_LOW:
        return _finding(
            f"the teacher's first BatchNorm speaks of inputs in [0, 1] ({seen}), and the input "
            "spec has a mean and std",
            "leave mean and std out of the spec, unless the teacher was trained with them",
        )
    return None


def check_inputs(inputs: Tensor, spec: InputSpec) -> Finding | None:
    """Whether evaluation inputs (N, C, H, W) lie where the spec's normalisation puts [0, 1].

    Returns:
        A finding with the code "evaluation-inputs", or None.
    """
    if spec.kind != "image" or inputs.dim() != 4 or not len(inputs):
        return None
    low = inputs.amin((0, 2, 3)).double().cpu()
    high = inputs.amax((0, 2, 3)).double().cpu()
    mean = torch.tensor(spec.mean or (0.0,), dtype=torch.float64)
    std = torch.tensor(spec.std or (1.0,), dtype=torch.float64)
    least, most = (0 - mean) / std, (1 - mean) / std
    seen = f"from {float(low.min()):.3g} to {float(high.max()):.3g}"
    room = _TOLERANCE * (most - least)
    if bool(((low < least - room) | (high > most + room)).any()):
        return _evaluation(
            f"the evaluation inputs run {seen}, and by the input spec they lie between "
            f"{float(least.min()):.3g} and {float(most.max()):.3g}",
        )
    # Normalised images have dark pixels below 0 and are not bounded by 1.
    inside = bool((low >= 0).all() and (high <= 1 + _TOLERANCE).all())
    if spec.mean and inside and bool((least < -0.2).all()) and bool((high > 0.9).any()):
        return _evaluation(
            f"the evaluation inputs run {seen}, as images do that are not normalised, and the "
            "input spec has a mean and std"
        )
    return None


def check_score(score: float, num_classes: int) -> Finding | None:
    """Whether the teacher's accuracy on the evaluation inputs is near chance.

    Returns:
        A finding with the code "teacher-score", or None.
    """
    if score > 1 / num_classes + min(0.1, 1 / num_classes):
        return None
    return Finding(
        "teacher-score",
        "warning",
        f"the teacher scores {score:.1%} on your evaluation inputs, where guessing one of "
        f"{num_classes} classes gives {1 / num_classes:.1%}",
        "check the normalisation of the inputs, the order of the labels and the teacher's weights",
    )


def _first_layers(
    network: nn.Module, spec: InputSpec
) -> tuple[nn.Conv2d | None, _BatchNorm] | None:
    """The first convolution of the input and the BatchNorm right behind it, or BatchNorm alone."""
    device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
    inputs = torch.zeros((2, *spec.shape), device=device)
    made: list[tuple[nn.Conv2d, Tensor]] = []
    found: list[tuple[nn.Conv2d | None, _BatchNorm]] = []

    def after(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d) and args and args[0] is inputs:
            made.append((layer, output))

    def before(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if found or not isinstance(layer, _BatchNorm):
            return
        if args[0] is inputs:
            found.append((None, layer))
        found.extend((layer_before, layer) for layer_before, out in made if args[0] is out)

    handles = [
        *(one.register_forward_hook(after) for one in network.modules()),
        *(one.register_forward_pre_hook(before) for one in network.modules()),
    ]
    try:
        with seeding.preserved(), modes.evaluating(network):
            predict(network, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _fitted_std(weight: Tensor, var: Tensor) -> float:
    """The deviation that explains the output variances best, over how close neighbours are.

    Args:
        weight: (K, C, h, w).
        var: (K,), of the outputs.
    """
    count, channels, height, width = weight.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1).double()
    distance = torch.cdist(places, places)
    flat = weight.reshape(count, channels, height * width)
    # Colours of one pixel go together, too.
    between = torch.full((channels, channels), 0.9, dtype=torch.float64).fill_diagonal_(1.0)
    best, found = math.inf, 1.0
    for correlation in _CORRELATIONS:
        kernel = correlation**distance
        expected = torch.einsum("kcp,cd,pq,kdq->k", flat, between, kernel, flat)
        ratio = 0.5 * torch.log(var / expected.clamp_min(1e-12))
        middle = ratio.median()
        spread = float((ratio - middle).abs().mean())
        if spread < best:
            best, found = spread, float(middle.exp())
    return found


def _distance(known: Remembered, mean: tuple[float, ...], std: tuple[float, ...]) -> float:
    """How far what is remembered lies from a normalisation, per channel on average."""
    means = (known.mean - torch.tensor(mean, dtype=torch.float64)).abs().mean()
    scales = torch.tensor(std, dtype=torch.float64).log()
    return float(means) + float((math.log(max(known.std, 1e-9)) - scales).abs().mean())


def _finding(message: str, knob: str) -> Finding:
    return Finding("normalisation", "warning", message, knob)


def _evaluation(message: str) -> Finding:
    return Finding(
        "evaluation-inputs", "warning", message, "hand in spec.normalize(images in [0, 1])"
    )
