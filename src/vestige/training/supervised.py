"""Supervised training: how teachers come about."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.core import optim
from vestige.core.modes import train_mode
from vestige.core.protocols import OwnLoss
from vestige.core.seeding import generator, global_state, seeded, set_global_state
from vestige.core.types import predict
from vestige.errors import CheckpointError, DataError, NonFiniteLossError, ShapeError
from vestige.training.checkpoint import CheckpointStore
from vestige.training.compute import laid_out
from vestige.training.spatial import flips, mirrored, moved, random_flip, random_shift, shifts

__all__ = ["random_flip", "random_shift", "train_classifier"]

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
    focal_gamma: float = 0.0,
    ignore_index: int = -100,
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
        module: maps inputs to logits (B, K), or (B, K, H, W); batches are moved to its device. One
            with `core.protocols.OwnLoss` is trained by its own loss, in place of the cross entropy.
        inputs: (N, ...), normalised; (N, C, H, W) where `shift`, `flip` or `channels_last` is used.
        labels: (N,), int64 in [0, K); or masks (N, H, W) of them, which are shifted and mirrored
            with their images; or whatever a module's own loss takes.
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
        focal_gamma: weighs each term of the cross entropy by (1 - p)^gamma, p the probability of
            the right class (focal loss, Lin et al. 2017, eq. 4); higher looks more at what is still
            wrong, 0 is plain cross entropy.
        ignore_index: label of what is left out of the loss; its mean is over the rest.
        seed: of everything random here.
        on_epoch: called after each epoch with its number from 1 and its mean loss in nats.
        store: keeps the checkpoints; None keeps none.
        go_on: asked after each epoch but the last.

    Returns:
        Whether all epochs are done; False after `go_on` said no.

    Raises:
        DataError: there are no inputs, a label is above the number of logits, or a setting is out
            of range.
        ShapeError: labels do not fit the inputs or the logits, or images are asked for and there is
            no H and W.
        NonFiniteLossError: the loss became NaN or infinite.
        CheckpointError: the checkpoint does not fit.
    """
    images = bool(shift or flip or channels_last)
    own = module if isinstance(module, OwnLoss) else None
    _check(inputs, labels, epochs, batch_size, shift, images=images, any_labels=own is not None)
    if own is not None and (focal_gamma or label_smoothing):
        raise DataError(
            f"got focal_gamma={focal_gamma}, label_smoothing={label_smoothing} for a "
            f"{type(module).__name__}, which has a loss of its own; leave them out"
        )
    if focal_gamma < 0 or (focal_gamma and label_smoothing):
        raise DataError(
            f"got focal_gamma={focal_gamma}, label_smoothing={label_smoothing}, expected at least "
            "0, and one of the two; set the other to 0"
        )
    highest = 0 if own else int(labels.masked_fill(labels == ignore_index, 0).max())
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
                answers = labels[rows.to(labels.device)]
                if shift:
                    start = shifts(len(batch), shift, rng)
                    batch = moved(batch, start)
                    answers = moved(answers, start) if answers.dim() > 1 else answers
                if flip:
                    turned = flips(len(batch), rng)
                    batch = mirrored(batch, turned)
                    answers = mirrored(answers, turned) if answers.dim() > 1 else answers
                answers = answers.to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    batch = batch.to(device, memory_format=layout)
                    if own is not None:
                        loss = own.training_loss(batch, answers)
                    else:
                        logits = predict(module, batch).logits
                        _check_logits(logits, answers, highest)
                        loss = _loss(logits, answers, label_smoothing, focal_gamma, ignore_index)
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


def _check_logits(logits: Tensor, labels: Tensor, highest: int) -> None:
    if logits.shape[:1] + logits.shape[2:] != labels.shape:
        raise ShapeError(
            f"got logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}, "
            "expected logits (B, K) for labels (B,), or (B, K, H, W) for masks (B, H, W); take a "
            "network that answers at every pixel of its input for masks, and no other"
        )
    if logits.shape[1] <= highest:
        raise DataError(
            f"got the label {highest} and {logits.shape[1]} logits, expected labels from 0 to "
            f"{logits.shape[1] - 1}; number the classes from 0, or set ignore_index to what stands "
            "for none"
        )


def _loss(
    logits: Tensor, labels: Tensor, smoothing: float, focal_gamma: float, ignore_index: int
) -> Tensor:
    """Mean over what is not ignored; 0 where that is nothing."""
    if labels.dim() == 1 and not focal_gamma:
        return functional.cross_entropy(
            logits, labels, label_smoothing=smoothing, ignore_index=ignore_index
        )
    terms = functional.cross_entropy(
        logits, labels, label_smoothing=smoothing, ignore_index=ignore_index, reduction="none"
    )
    if focal_gamma:
        # 1 - p without cancellation; at p = 1 the gradient of a power below 1 is infinite.
        terms = terms * (-torch.expm1(-terms)).clamp_min(1e-8) ** focal_gamma
    return terms.sum() / (labels != ignore_index).sum().clamp_min(1)


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
    inputs: Tensor,
    labels: Tensor,
    epochs: int,
    batch_size: int,
    shift: int,
    *,
    images: bool,
    any_labels: bool,
) -> None:
    if len(inputs) == 0:
        raise DataError("got no inputs to train on, expected at least one; hand in data")
    dense = labels.dim() == 3 and inputs.dim() == 4
    if any_labels and len(labels) != len(inputs):
        raise ShapeError(f"got {len(labels)} labels for {len(inputs)} inputs, expected one each")
    if not any_labels and labels.shape != (
        inputs.shape[:1] + inputs.shape[2:] if dense else inputs.shape[:1]
    ):
        raise ShapeError(
            f"got labels of shape {tuple(labels.shape)}, expected ({len(inputs)},) for "
            f"{len(inputs)} inputs; hand in one class number per input, or masks of their size"
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
