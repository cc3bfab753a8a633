"""Supervised training of a classifier: how teachers come about."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.core.modes import train_mode
from vestige.core.seeding import generator, seeded
from vestige.core.types import predict
from vestige.errors import DataError, NonFiniteLossError, ShapeError

WARM_UP = 0.1


def train_classifier(
    module: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 3e-3,
    weight_decay: float = 1e-2,
    shift: int = 0,
    seed: int = 0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> None:
    """Train `module` in place with cross entropy and AdamW; it ends in eval mode.

    The learning rate rises linearly over the first tenth of the steps and then falls along half a
    cosine. Order, shifts and the module's own randomness (dropout) depend on `seed` alone; torch's
    global generators are left as they were. A last batch that is not full is left out of an epoch
    (the order differs every epoch), so that BatchNorm always sees equal batches.

    Args:
        module: maps inputs to logits (B, K); batches are moved to its device.
        inputs: (N, ...), normalised; (N, C, H, W) where `shift` is used.
        labels: (N,), int64 in [0, K).
        epochs: passes over the data.
        batch_size: rows per step; a smaller set is one batch.
        lr: highest learning rate.
        weight_decay: AdamW's decoupled weight decay, on all weights.
        shift: largest random shift in pixels, along both axes, of each image in each step; the
            border is repeated. 0 leaves images as they are.
        seed: of everything random here.
        on_epoch: called after each epoch with its number from 1 and its mean loss in nats.

    Raises:
        DataError: there are no inputs.
        ShapeError: labels do not fit the inputs, or `shift` is asked for inputs without H and W.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    _check(inputs, labels, epochs, batch_size, shift)
    rng = generator(seed, "supervised")
    device = next((weight.device for weight in module.parameters()), inputs.device)
    batch_size = min(batch_size, len(inputs))
    steps = len(inputs) // batch_size
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_factor, steps=epochs * steps))
    train_mode(module)
    with seeded(seed, "supervised"):
        for epoch in range(1, epochs + 1):
            total = torch.zeros((), device=device)
            order = torch.randperm(len(inputs), generator=rng)[: steps * batch_size]
            for rows in order.split(batch_size):
                batch = inputs[rows.to(inputs.device)]
                if shift:
                    batch = random_shift(batch, shift, rng)
                answers = labels[rows.to(labels.device)].to(device)
                logits = predict(module, batch.to(device)).logits
                loss = functional.cross_entropy(logits, answers)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach()
            mean = total.item() / steps
            if not math.isfinite(mean):
                raise NonFiniteLossError(
                    f"got a loss of {mean} in epoch {epoch}, expected a finite one; lower lr={lr}"
                )
            if on_epoch is not None:
                on_epoch(epoch, mean)
    module.eval()


def random_shift(images: Tensor, pixels: int, rng: torch.Generator) -> Tensor:
    """Move each image by its own whole number of pixels, repeating the border.

    Args:
        images: (B, C, H, W).
        pixels: largest shift along each axis; every shift in [-pixels, pixels] is equally likely.
        rng: on any device.

    Returns:
        (B, C, H, W), same dtype and device.
    """
    count, _, height, width = images.shape
    padded = functional.pad(images, (pixels,) * 4, mode="replicate")
    start = torch.randint(2 * pixels + 1, (2, count, 1), generator=rng, device=rng.device)
    start = start.to(images.device)
    rows = (start[0] + torch.arange(height, device=images.device))[:, :, None]
    columns = (start[1] + torch.arange(width, device=images.device))[:, None, :]
    batch = torch.arange(count, device=images.device)[:, None, None]
    return padded[batch, :, rows, columns].permute(0, 3, 1, 2).contiguous()


def _factor(step: int, *, steps: int) -> float:
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _check(inputs: Tensor, labels: Tensor, epochs: int, batch_size: int, shift: int) -> None:
    if len(inputs) == 0:
        raise DataError("got no inputs to train on, expected at least one; hand in data")
    if labels.shape != inputs.shape[:1]:
        raise ShapeError(
            f"got labels of shape {tuple(labels.shape)}, expected ({len(inputs)},) for "
            f"{len(inputs)} inputs; hand in one class number per input"
        )
    if min(epochs, batch_size) < 1 or shift < 0:
        raise DataError(
            f"got epochs={epochs}, batch_size={batch_size}, shift={shift}, expected at least 1, 1 "
            "and 0; correct them"
        )
    if shift and inputs.dim() != 4:
        raise ShapeError(
            f"got inputs of shape {tuple(inputs.shape)} with shift={shift}, expected (N, C, H, W); "
            "set shift=0 for inputs that are no images"
        )
