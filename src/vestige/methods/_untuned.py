"""Settings for networks and inputs that nobody tuned: what the methods' `suggest` have in common.

All of it is our choice and no paper's, set on ConvNets and LeNet-5 that were trained on MNIST,
Fashion-MNIST and CIFAR-10.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from vestige.core import seeding
from vestige.core.protocols import Task, Teacher
from vestige.core.types import InputSpec
from vestige.models.cost import forward_flops, iterations_for
from vestige.models.probes import batchnorm_layers

_ADVERSARIAL: Mapping[str, Any] = {
    "student_steps": 5,
    "batch_size": 64,
    "student_optimizer": "adam",
    "student_lr": 1e-2,
    "student_weight_decay": 0.0,
    "generator_lr": 5e-3,
    "schedule": "cosine",
    "generator": "pyramid",
    "latent_dim": 100,
    "units": "relative",
}
_COMMON = (
    *("batch_size", "student_optimizer", "student_lr", "student_weight_decay", "generator_lr"),
    *("schedule", "generator", "latent_dim"),
)
_WITH_STATISTICS: Mapping[str, Any] = {"bn_weight": 10.0}
_WITHOUT_STATISTICS: Mapping[str, Any] = {
    "balance_weight": 5.0,
    "one_hot_weight": 1.0,
    "replay": 0.5,
    "student_lr": 4e-3,
}
_INVERSION: Mapping[str, Any] = {
    "warmup": 4,
    "rounds": 20,
    "batches_per_round": 1,
    "inversion_steps": 60,
    "synthesis_batch_size": 128,
    "student_steps": 100,
    "batch_size": 128,
    "bn_weight": 1.0,
    "one_hot_weight": 1.0,
    "negatives": 512,
    "bank_size": 4096,
    "head_dim": 64,
    "generator": "pyramid",
    "latent_dim": 100,
    "generator_lr": 1e-2,
    "temperature": 4.0,
    "crop_padding": 1,
    "flip": False,
    "student_optimizer": "adam",
    "student_lr": 4e-3,
    "student_weight_decay": 0.0,
    "schedule": "cosine",
}
_CONTRAST = ("negatives", "bank_size", "head_dim")
_NETWORKS = (*_CONTRAST, "generator", "generator_width", "generator_lr", "latent_dim")
_PIXELS: Mapping[str, Any] = {"bn_weight": 3.0, "inversion_lr": 0.3, "roll": 1}
_FAST: Mapping[str, Any] = {
    "warmup": 20,
    "rounds": 40,
    "student_steps": 50,
    "inversion_steps": 10,
    "bn_weight": 1.0,
    "generator_lr": 5e-3,
    "latent_lr": 1e-2,
}
_ROUNDS, _BATCH_SIZE, _SMALL_AREA = 40, 64, 48 * 48


def adversarial(
    task: Task,
    teacher: Teacher,
    student: nn.Module,
    make_generator: Callable[[Mapping[str, Any]], nn.Module],
) -> Mapping[str, Any]:
    """For a generator against a student.

    The generator fits any size of image and makes what the teacher takes. The number of iterations
    follows from the arithmetic of the three networks. A teacher with BatchNorm is asked for its
    statistics; one without gives less to hold on to, so the batch is spread over the classes, fakes
    are to be clear, and part of them is replayed.

    Args:
        task: classification of images, or nothing is suggested.
        teacher: a network, or nothing is suggested.
        student: on the device of the run.
        make_generator: from settings.
    """
    spec = task.spec
    if not isinstance(teacher, nn.Module):
        return {}
    if task.kind != "classification" or len(spec.shape) != 3:
        return {}
    statistics = _WITH_STATISTICS if batchnorm_layers(teacher) else _WITHOUT_STATISTICS
    chosen = {
        **_ADVERSARIAL,
        **statistics,
        "generator_width": 16 if spec.shape[1] * spec.shape[2] <= _SMALL_AREA else 8,
        # Pixels lie in [0, 1] before they are normalised; other inputs have no known range.
        "generator_head": "sigmoid" if spec.kind == "image" else "tanh_bn",
    }
    row = _iteration(chosen, teacher, student, spec, make_generator)
    return {**chosen, **length(row, student, fewest=80, wanted=400, most=2400)}


def generative(
    task: Task,
    teacher: Teacher,
    student: nn.Module,
    make_generator: Callable[[Mapping[str, Any]], nn.Module],
    own: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Like `adversarial`, for a generator with terms and a number of student steps of its own.

    Args:
        task: classification of images, or nothing is suggested.
        teacher: a network, or nothing is suggested.
        student: on the device of the run.
        make_generator: from settings.
        own: what is the method's own; goes before what is common.
    """
    spec = task.spec
    if not isinstance(teacher, nn.Module) or task.kind != "classification" or len(spec.shape) != 3:
        return {}
    chosen = {
        **{key: _ADVERSARIAL[key] for key in _COMMON},
        "generator_width": 16 if spec.shape[1] * spec.shape[2] <= _SMALL_AREA else 8,
        "generator_head": "sigmoid" if spec.kind == "image" else "tanh_bn",
        **own,
    }
    row = _iteration(chosen, teacher, student, spec, make_generator)
    most, rows = 12_000 // chosen.get("student_steps", 1), chosen["batch_size"]
    return {**chosen, **length(row, student, fewest=80, wanted=400, most=most, batch_size=rows)}


def _iteration(
    chosen: Mapping[str, Any],
    teacher: nn.Module,
    student: nn.Module,
    spec: InputSpec,
    make_generator: Callable[[Mapping[str, Any]], nn.Module],
) -> float:
    """Floating-point operations of one generation and `student_steps` imitations on one row."""
    with seeding.preserved():
        generator = forward_flops(make_generator(chosen), (chosen["latent_dim"],))
    # A backward to the input costs a forward, a full one two.
    steps = chosen.get("student_steps", 1)
    # Counted twice: its BatchNorms and upsamplings of large maps were seen to take as long again.
    row: float = 2 * generator * (steps + 3)
    row += forward_flops(teacher, spec.shape) * (steps + 2)
    row += forward_flops(student, spec.shape) * (3 * steps + 2)
    return row


def inversion(task: Task, teacher: Teacher, student: nn.Module) -> Mapping[str, Any]:
    """For a pool of images that is inverted batch by batch, and a student taught from it.

    The generator fits any size of image. A few batches come before the student's first step, the
    others in between. Without BatchNorm statistics only the classes are asked for. The numbers of
    batches and steps are the same for all networks, so a large teacher takes long.

    Args:
        task: classification of images, or nothing is suggested.
        teacher: a network, or nothing is suggested.
        student: on the device of the run.
    """
    spec = task.spec
    if not isinstance(teacher, nn.Module) or spec.kind != "image":
        return {}
    if task.kind != "classification" or len(spec.shape) != 3:
        return {}
    return {
        **_INVERSION,
        "bn_weight": _INVERSION["bn_weight"] if batchnorm_layers(teacher) else 0.0,
        "generator_width": 16 if spec.shape[1] * spec.shape[2] <= _SMALL_AREA else 8,
    }


def fast_inversion(task: Task, teacher: Teacher, student: nn.Module) -> Mapping[str, Any]:
    """Like `inversion`, with many batches of few steps each."""
    found = inversion(task, teacher, student)
    return found and {
        **{key: found[key] for key in found if key not in _CONTRAST},
        **_FAST,
        "bn_weight": _FAST["bn_weight"] if found["bn_weight"] else 0.0,
    }


def pixel_inversion(task: Task, teacher: Teacher, student: nn.Module) -> Mapping[str, Any]:
    """Like `inversion`, without a generator: the pixels are optimised themselves."""
    found = inversion(task, teacher, student)
    return found and {
        **{key: found[key] for key in found if key not in _NETWORKS},
        **_PIXELS,
        "bn_weight": _PIXELS["bn_weight"] if found["bn_weight"] else 0.0,
    }


def imitation(
    task: Task, teacher: Teacher, student: nn.Module, *, passes: int
) -> Mapping[str, Any]:
    """For a student that learns from images which are there: Adam with a cosine.

    As many steps as take about four minutes on two cores by the arithmetic of both networks, within
    limits. A teacher that shows no network is taken to be as dear as the student.

    Args:
        task: classification of images, or nothing is suggested.
        teacher: is asked once per row.
        student: on the device of the run.
        passes: of the student forward per row; a full backward counts as two.
    """
    shape = task.spec.shape
    if task.kind != "classification" or task.spec.kind != "image":
        return {}
    own = forward_flops(student, shape)
    other = forward_flops(teacher, shape) if isinstance(teacher, nn.Module) else own
    return {
        **length(other + passes * own, student, fewest=400, wanted=2000, most=12_000),
        "student_optimizer": "adam",
        "student_lr": 4e-3,
        "student_weight_decay": 0.0,
        "schedule": "cosine",
    }


def length(
    row: float,
    student: nn.Module,
    *,
    fewest: int,
    wanted: int,
    most: int,
    batch_size: int = _BATCH_SIZE,
) -> dict[str, int]:
    """Batch size, rounds and iterations for about four minutes on two cores, within limits.

    Args:
        row: floating-point operations of one iteration on one row.
        student: tells the device.
        fewest: iterations, however long they take.
        wanted: iterations for which the batch is made smaller, down to 16 rows.
        most: iterations, however quick they are.
        batch_size: the largest.
    """
    device = next((weight.device for weight in student.parameters()), torch.device("cpu"))
    while batch_size > 16 and iterations_for(row * batch_size, device) < wanted:
        batch_size //= 2
    total = min(most, max(fewest, iterations_for(row * batch_size, device)))
    return {"batch_size": batch_size, "rounds": _ROUNDS, "iterations": -(-total // _ROUNDS)}
