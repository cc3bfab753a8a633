"""Supervised training of a classifier: how teachers come about."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.core import optim
from vestige.core.modes import train_mode
from vestige.core.seeding import generator, global_state, seeded, set_global_state
from vestige.core.types import predict
from vestige.errors import CheckpointError, DataError, NonFiniteLossError, ShapeError
from vestige.training.checkpoint import CheckpointStore
from vestige.training.compute import laid_out

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
    flip: bool = False,
    label_smoothing: float = 0.0,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    momentum: float = 0.9,
    nesterov: bool = False,
    precision: Literal["fp32", "bf16"] = "fp32",
    channels_last: bool = False,
    seed: int = 0,
    on_epoch: Callable[[int, float], None] | None = None,
    store: CheckpointStore | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> bool:
    """Train `module` in place with cross entropy; at the end it is in eval mode.

    The learning rate rises linearly over the first tenth of the steps and then falls along half a
    cosine. Order, shifts and the module's own randomness (dropout) depend on `seed` alone; torch's
    global generators are left as they were. A last batch that is not full is left out of an epoch
    (the order differs every epoch), so that BatchNorm always sees equal batches.

    With a `store` there is a checkpoint after every epoch, and training goes on from the newest
    one in it. On a CPU the outcome is the same, bit for bit, as without the break.

    Args:
        module: maps inputs to logits (B, K); batches are moved to its device.
        inputs: (N, ...), normalised; (N, C, H, W) where `shift`, `flip` or `channels_last` is used.
        labels: (N,), int64 in [0, K).
        epochs: passes over the data.
        batch_size: rows per step; a smaller set is one batch.
        lr: highest learning rate.
        weight_decay: decoupled with AdamW, an L2 penalty with SGD, on all weights.
        shift: largest random shift in pixels, along both axes, of each image in each step; the
            border is repeated. 0 leaves images as they are.
        flip: whether each image is mirrored left to right with probability 1/2 in each step.
        label_smoothing: share of the target that is spread evenly over all classes, in [0, 1).
        optimizer: "adamw" or "sgd".
        momentum: of SGD.
        nesterov: of SGD, whether the momentum looks ahead.
        precision: "bf16" computes forward and loss under autocast; weights stay in float32.
        channels_last: memory format while training; faster convolutions on most GPUs.
        seed: of everything random here.
        on_epoch: called after each epoch with its number from 1 and its mean loss in nats.
        store: keeps the checkpoints; None keeps none.
        go_on: asked after each epoch but the last.

    Returns:
        Whether all epochs are done; False after `go_on` said no.

    Raises:
        DataError: there are no inputs, or a setting is out of range.
        ShapeError: labels do not fit the inputs, or images are asked for and there is no H and W.
        NonFiniteLossError: the loss became NaN or infinite.
        CheckpointError: the checkpoint does not fit.
    """
    images = bool(shift or flip or channels_last)
    _check(inputs, labels, epochs, batch_size, shift, images=images)
    rng = generator(seed, "supervised")
    device = next((weight.device for weight in module.parameters()), inputs.device)
    batch_size = min(batch_size, len(inputs))
    steps = len(inputs) // batch_size
    layout = torch.channels_last if channels_last else torch.preserve_format
    moves = _optimizer(module, optimizer, lr, weight_decay, momentum, nesterov)
    train_mode(module)
    with laid_out(module) if channels_last else nullcontext(), seeded(seed, "supervised"):
        done = 0 if store is None else _restore(store, module, moves, rng)
        for epoch in range(done + 1, epochs + 1):
            total = torch.zeros((), device=device)
            order = torch.randperm(len(inputs), generator=rng)[: steps * batch_size]
            for step, rows in enumerate(order.split(batch_size), start=(epoch - 1) * steps):
                moves.param_groups[0]["lr"] = lr * _factor(step, steps=epochs * steps)
                batch = inputs[rows.to(inputs.device)]
                if shift:
                    batch = random_shift(batch, shift, rng)
                if flip:
                    batch = random_flip(batch, rng)
                answers = labels[rows.to(labels.device)].to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    logits = predict(module, batch.to(device, memory_format=layout)).logits
                    loss = functional.cross_entropy(
                        logits, answers, label_smoothing=label_smoothing
                    )
                moves.zero_grad(set_to_none=True)
                loss.backward()
                moves.step()
                total += loss.detach()
            mean = total.item() / steps
            if not math.isfinite(mean):
                raise NonFiniteLossError(
                    f"got a loss of {mean} in epoch {epoch}, expected a finite one; lower lr={lr}"
                )
            if store is not None:
                _save(store, epoch, module, moves, rng)
            if on_epoch is not None:
                on_epoch(epoch, mean)
            if epoch < epochs and not go_on():
                return False
    module.eval()
    return True


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


def random_flip(images: Tensor, rng: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: (B, C, H, W).
        rng: on any device.

    Returns:
        (B, C, H, W), same dtype and device.
    """
    mirrored = torch.randint(2, (len(images), 1, 1, 1), generator=rng, device=rng.device)
    return torch.where(mirrored.to(images.device).bool(), images.flip(3), images)


def _optimizer(
    module: nn.Module,
    name: str,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
) -> torch.optim.Optimizer:
    weights = list(module.parameters())
    if name == "adamw":
        # Not fused: the shipped teachers were made like this, to the last bit.
        return torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
    make = optim.factory("sgd", lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    return make(weights)


def _save(
    store: CheckpointStore,
    epoch: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator,
) -> None:
    state = {
        "epoch": epoch,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": rng.get_state(),
        "globals": global_state(),
    }
    store.save(epoch, state, {})


def _restore(
    store: CheckpointStore,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator,
) -> int:
    """Take over the newest checkpoint; the number of epochs that are done."""
    saved = store.load()
    if saved is None:
        return 0
    try:
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint in {store.folder} does not fit this training: {error}; start again "
            "without --resume"
        ) from error
    # Fused kernels walk memory as it lies, and a checkpoint does not keep how that was.
    for weight, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                values[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
    rng.set_state(saved["rng"])
    set_global_state(saved["globals"])
    return int(saved["epoch"])


def _factor(step: int, *, steps: int) -> float:
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _check(
    inputs: Tensor, labels: Tensor, epochs: int, batch_size: int, shift: int, *, images: bool
) -> None:
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
    if images and inputs.dim() != 4:
        raise ShapeError(
            f"got inputs of shape {tuple(inputs.shape)} with shift={shift}, flip or channels_last, "
            "expected (N, C, H, W); set shift=0 and leave the others out for inputs that are no "
            "images"
        )
