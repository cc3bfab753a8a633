"""A student whose last layer is projection and classifier in the teacher's form while it learns."""

import hashlib
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from vestige.core import modes
from vestige.core.types import Inputs, join_rows, predict
from vestige.errors import ContractError, TeacherError
from vestige.models.probes import FeatureProbe, LinearProbe, LinearSeen, penultimate_layer

logger = logging.getLogger(__name__)


class AlignedClassifier(nn.Module):
    """Features to the teacher's width, then a classifier of the teacher's shape.

    Attributes:
        projection: linear layer without bias (d_S to d_T), or the identity.
        classifier: linear layer (d_T to K).
    """

    def __init__(self, projection: nn.Linear | nn.Identity, classifier: nn.Linear) -> None:
        super().__init__()
        self.projection = projection
        self.classifier = classifier

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, d_S) to logits (B, K)."""
        logits: Tensor = self.classifier(self.projection(features))
        return logits

    def folded(self) -> Tensor:
        """The weights (K, d_S) of one linear layer that does the same; a copy, no gradient."""
        weight = self.classifier.weight.detach()
        if isinstance(self.projection, nn.Identity):
            return weight.clone()
        return weight @ self.projection.weight.detach()


class ClassifierAlignment:
    """Puts an `AlignedClassifier` in the place of a student's last linear layer inside a `with`.

    At the end the user's own layer is back, the very object, with projection and classifier folded
    into its weights, so the student answers as it did. Inside, everything that trains, judges or
    saves the student sees projection and classifier as a part of it.

    Projection and classifier are made here, once: the projection by chance, the classifier as the
    teacher's. A student that did not learn at all gets its layer back as it was.

    Attributes:
        inside: name of the classifier in the student, for a probe, inside the `with`.
    """

    def __init__(
        self,
        student: nn.Module,
        layer: str,
        target: nn.Linear,
        *,
        tied: bool = False,
        always_project: bool = False,
    ) -> None:
        """Makes both parts; leaves the student as it is.

        Args:
            student: any network with a linear layer of that name.
            layer: qualified name of its last linear layer, from d_S features to K logits.
            target: the teacher's last layer, from d_T features to K logits.
            tied: the classifier is the teacher's and does not move.
            always_project: project also where d_S is d_T.

        Raises:
            TeacherError: the student's layer is no linear layer with a place in a larger network,
                or makes another number of logits.
        """
        own = dict(student.named_modules()).get(layer)
        if not layer or not isinstance(own, nn.Linear):
            raise TeacherError(
                f"got {layer!r}, a {type(own).__name__}, as the last layer of the student "
                f"{type(student).__name__}, expected a linear layer inside of it; name another, or "
                "do without alignment"
            )
        if own.out_features != target.out_features:
            raise TeacherError(
                f"got a last layer of {own.out_features} logits in the student and of "
                f"{target.out_features} in the teacher, expected as many; name other layers"
            )
        self.inside = f"{layer}.classifier"
        self._student, self._layer, self._own = student, layer, own
        width, like = target.in_features, {"device": own.weight.device, "dtype": own.weight.dtype}
        projection: nn.Linear | nn.Identity = nn.Identity()
        if own.in_features != width or always_project:
            projection = nn.Linear(own.in_features, width, bias=False, **like)
        classifier = nn.Linear(width, own.out_features, bias=own.bias is not None, **like)
        with torch.no_grad():
            classifier.weight.copy_(target.weight)
            if classifier.bias is not None and target.bias is not None:
                classifier.bias.copy_(target.bias)
            elif classifier.bias is not None:
                classifier.bias.zero_()
            elif target.bias is not None and target.bias.any():
                logger.warning(
                    "the student's last layer has no bias, and the teacher's has one, which is "
                    "left out"
                )
        classifier.requires_grad_(not tied)
        self._aligned = AlignedClassifier(projection, classifier)
        self._start = ""
        self._entered = False

    def __enter__(self) -> Self:
        if self._entered:
            raise ContractError("got an alignment that is entered already; leave it first")
        self._entered = True
        # The student may have moved to another device since.
        self._aligned.to(self._own.weight.device)
        self._aligned.train(self._own.training)
        self._put(self._aligned)
        self._start = _digest(self._student)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered = False
        own, aligned = self._own, self._aligned
        learned = _digest(self._student) != self._start
        self._put(own)
        with torch.no_grad():
            own.to(aligned.classifier.weight.device)
            if not learned:
                return
            own.weight.copy_(aligned.folded())
            if own.bias is not None:
                own.bias.copy_(aligned.classifier.bias)

    def _put(self, layer: nn.Module) -> None:
        *path, name = self._layer.split(".")
        setattr(self._student.get_submodule(".".join(path)), name, layer)


@dataclass(frozen=True)
class Seen:
    """What one or two passes of a student showed.

    Attributes:
        logits: (B, K) of the first inputs, then of the second.
        features: what enters the last layer, (B, d_S) of the first, then of the second; None where
            nobody asked.
        aligned: the aligned classifier in the pass of the first, whose rows come first in its
            `inputs`; None without alignment.
    """

    logits: Tensor
    features: Tensor | None
    aligned: LinearSeen | None


def see(
    student: nn.Module,
    model: Any,
    inputs: Inputs,
    second: Inputs | None = None,
    *,
    apart: bool = False,
    features: str = "",
    aligned: str = "",
) -> Seen:
    """Run a student on one or two batches and look at its last layer.

    Args:
        student: the live network, whose layers are looked at.
        model: itself, or it at other weights; every pass goes through it.
        inputs: of the first pass.
        second: further inputs; None runs one pass.
        apart: a pass of their own for the second, which leaves running statistics alone; False
            joins both.
        features: name of the layer whose inputs are `Seen.features`; "" for none.
        aligned: name of the linear layer that is `Seen.aligned`; "" for none.
    """
    # Made anew each time: which layer is the last one changes while there is an alignment.
    above = FeatureProbe(student, [features], of="input") if features else None
    last = LinearProbe(student, aligned) if aligned else None
    passes = [inputs]
    if second is not None:
        passes = [inputs, second] if apart else [join_rows(inputs, second)]
    logits, seen, read = [], [], None
    for index, one in enumerate(passes):
        kept = modes.statistics_kept(student) if index else nullcontext()
        with kept, above or nullcontext(), last or nullcontext():
            logits.append(predict(model, one).logits)
        if above is not None:
            seen.append(above.instance_means())
        if last is not None and read is None:
            read = last.read()
    return Seen(torch.cat(logits), torch.cat(seen) if seen else None, read)


def last_linear(
    module: nn.Module, shape: tuple[int, ...], layer: str = "", *, whose: str = "teacher"
) -> str:
    """Name of the linear layer that makes the logits of a network.

    Found by one forward of a zero input without gradient, the network in eval mode meanwhile.

    Args:
        module: the network.
        shape: of one input.
        layer: a name to be checked; "" takes the last linear layer by definition.
        whose: for messages, with the setting `<whose>_layer`.

    Raises:
        TeacherError: the layer is no linear one, or does not make the logits.
    """
    name = layer or penultimate_layer(module)
    probe = LinearProbe(module, name)
    with torch.no_grad(), modes.evaluating(module), probe:
        logits = predict(module, next(module.parameters()).new_zeros(1, *shape)).logits
    if not _makes(probe.read(), logits):
        raise TeacherError(
            f"got {name!r} as the last layer of the {whose} {type(module).__name__}, whose logits "
            f"it does not make; name the linear layer that does as {whose}_layer, or set "
            "feature_weight: 0 and classifier_weight: 0"
        )
    return name


def _digest(network: nn.Module) -> str:
    """Of all weights; buffers move without learning."""
    digest = hashlib.blake2b(digest_size=16)
    for weight in network.parameters():
        digest.update(weight.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _makes(seen: LinearSeen, logits: Tensor) -> bool:
    bias = None if seen.bias is None else seen.bias.float()
    made = nn.functional.linear(seen.inputs, seen.weight.float(), bias)
    return made.shape == logits.shape and torch.allclose(made, logits, rtol=1e-3, atol=1e-4)
