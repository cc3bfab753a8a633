"""Real data as what a network is judged on: inputs as it takes them, labels as it numbers them."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vestige.core.protocols import DataSet
from vestige.core.types import InputSpec
from vestige.data.unlabelled.made_up import stream
from vestige.data.unlabelled.shifts import shifted
from vestige.errors import DataError
from vestige.recipes.catalog import DATA

logger = logging.getLogger(__name__)


def load_examples(
    name_or_path: str, spec: InputSpec, *, split: str = "test", classes: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Labelled examples for `distill(evaluate=...)`, from a set, a file or a folder of pictures.

    Args:
        name_or_path: "digits" or "scenes"; a set in the data folder; or the path of a folder with
            splits, of an .npz file with `x` and `y`, of a folder with one folder of pictures per
            class, or of one with pictures in images/ and masks in masks/. Class names in brackets
            behind it take these classes only.
        spec: what one input of the network looks like. Images are read in grey or colour, resized
            and normalised accordingly.
        split: "train", "select" or "test"; "all" takes a file, or a folder without splits, whole.
        classes: names of the network's classes in the order of its logits. Labels are then numbered
            by name; without them by the order of the data's own names, which for folders of
            pictures is alphabetical.

    Returns:
        Inputs (N, ...) float32 in the normalised space of `spec`, and labels (N,) int64, or masks
        (N, H, W) of them where the data has a class for each pixel.

    Raises:
        DataError: there is no such data, it cannot be read, or its classes are not `classes`.
    """
    found: DataSet = DATA.get(spec.kind).open(name_or_path, split)
    if not classes:
        inputs, labels = found.examples(spec)
        return inputs, labels
    (inputs, labels), _ = fit_classes(found, spec, classes, len(classes))
    return inputs, labels


def open_for_judging(name_or_path: str, split: str | None, spec: InputSpec) -> DataSet:
    """One split of a set; without a split "test", or all of a folder that has no splits.

    Raises:
        DataError: there is no such data, or it is in another layout.
    """
    kind = DATA.get(spec.kind)
    # Sets of other distributions need not offer it.
    undivided = getattr(kind, "undivided", None)
    if split is None:
        split = "all" if undivided is not None and undivided(name_or_path) else "test"
    opened: DataSet = kind.open(name_or_path, split)
    return opened


def fit_classes(
    data: DataSet, spec: InputSpec, classes: Sequence[str], num_classes: int
) -> tuple[Any, tuple[str, ...]]:
    """Examples whose labels, of inputs or of their pixels, are the network's, and its names.

    Names decide where the network and the data have the same ones in another order, or where the
    data has some of them only; else the numbers must be the same. Data without names counts as the
    network does.

    Args:
        data: one split.
        spec: what one input of the network looks like.
        classes: names of the network's classes, or ().
        num_classes: how many it has.

    Raises:
        DataError: neither fits.
    """
    own, known = tuple(data.classes), tuple(classes)
    if not own:
        examples = data.examples(spec)
        if isinstance(examples, tuple) and examples[1].dtype == torch.uint8:
            # Judged by texts, which are of no class.
            return examples, ()
        return examples, known or tuple(str(label) for label in range(num_classes))
    if own != known and set(own) <= set(known):
        examples = data.examples(spec)
        if isinstance(examples, tuple):
            inputs, labels = examples
            numbers = torch.tensor([known.index(name) for name in own])
            if isinstance(labels, Tensor) and labels.dim() == 1:
                return (inputs, numbers[labels.long()]), known
            if isinstance(labels, Tensor):
                return (inputs, _renumbered(data.name, labels, numbers, num_classes)), known
    if len(own) != num_classes:
        raise DataError(
            f"got {len(own)} classes in {data.name} ({_some(own)}), expected the {num_classes} of "
            f"the network{f' ({_some(known)})' if known else ''}; judge it on data of its own "
            "classes"
        )
    moved = [name for name in own if name in known and known.index(name) != own.index(name)]
    if moved:
        raise DataError(
            f"got the classes {_some(own)} in {data.name}, expected names of the network's "
            f"({_some(known)}): some are called alike but stand elsewhere ({_some(moved)}) and "
            "others are unknown; rename them"
        )
    if known and own != known:
        logger.warning(
            "the classes of %s (%s) are not called as the network's (%s); they are compared by "
            "their numbers",
            *(data.name, _some(own), _some(known)),
        )
    if not known and _count_otherwise(own):
        logger.warning(
            "the classes of %s are numbers, and are taken in the order of their names as text "
            "(%s); if the network counts them otherwise, store the data as .npz, or put zeros "
            "before them",
            *(data.name, _some(own)),
        )
    return data.examples(spec), known or own


def _renumbered(name: str, masks: Tensor, numbers: Tensor, num_classes: int) -> Tensor:
    """Masks whose classes are `numbers` of the network's; what is none of them stays as it is.

    Raises:
        DataError: a value that the data has no name for is a class of the network.
    """
    named = (masks >= 0) & (masks < len(numbers))
    clash = ~named & (masks >= 0) & (masks < num_classes)
    if bool(clash.any()):
        raise DataError(
            f"got masks with the values {_some([*map(str, masks[clash].unique().tolist())])} in "
            f"{name}, which names {len(numbers)} classes, expected pixels without a class to have "
            f"a value of at least {num_classes}, the network's number of classes; mark them as 255"
        )
    return numbers[torch.where(named, masks, 0)].where(named, masks)


def distorted(examples: Any, spec: InputSpec, shift: Sequence[str]) -> Any:
    """Examples whose images are distorted, the same ones whoever asks; labels as they are.

    Args:
        examples: inputs (N, C, H, W) in the normalised space of `spec`, and labels.
        spec: of the inputs.
        shift: names of distortions, one after another; () leaves the examples alone.
    """
    if not shift:
        return examples
    inputs, labels = examples
    images = spec.denormalize(inputs).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    changed = torch.from_numpy(shifted(images, shift, stream(0, "distorted examples")))
    pixels = changed.permute(0, 3, 1, 2).to(inputs) / 255
    return spec.normalize(pixels), labels


def _count_otherwise(names: Sequence[str]) -> bool:
    """Whether names are numbers in another order than by size."""
    return all(name.isdecimal() for name in names) and list(names) != sorted(names, key=int)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
