import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vestige.core.functional import functional
from vestige.core.types import count_parameters
from vestige.models.classifiers import ConvNet, resnet18, vgg11, wide_resnet
from vestige.models.probes import BatchNormProbe
from vestige.teachers.folding import folded
from vestige.teachers.loading import fingerprint
from vestige.teachers.white_box import WhiteBoxTeacher

# Folding rounds each weight once; what is left is the rounding of sums in another order.
ROUNDING = 1e-5


class Norms:
    """Counts, in any network, how often a BatchNorm layer computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = nn.BatchNorm2d.forward

        def counted(layer: nn.BatchNorm2d, values: Tensor) -> Tensor:
            self.count += 1
            return original(layer, values)

        monkeypatch.setattr(nn.BatchNorm2d, "forward", counted)

    def during(self, call: Any) -> int:
        self.count = 0
        call()
        return self.count


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> Norms:
    return Norms(monkeypatch)


def used(network: nn.Module) -> nn.Module:
    """With statistics and scales that are neither 0 nor 1."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 1.5)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 0, 0.3)
    return network.eval().requires_grad_(False)


def relative(one: Tensor, other: Tensor) -> float:
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / one.abs().max())


@pytest.mark.parametrize(
    ("network", "left"),
    [
        (lambda: ConvNet(3, 10, widths=(4, 8)), 0),
        (lambda: resnet18(width=4), 0),
        # What a sum of branches enters cannot be folded: one per block but the first, and the last.
        (lambda: wide_resnet(16, 2), 6),
        (vgg11, 0),
        (lambda: vgg11(bn=False), 0),
    ],
    ids=["convnet", "resnet", "wide_resnet", "vgg", "vgg_without"],
)
def test_answers_and_input_gradients_stay_with_fewer_layers(network, left, norms):
    net = used(network())
    teacher = WhiteBoxTeacher(copy.deepcopy(net))
    inputs = torch.randn(4, 3, 32, 32, requires_grad=True)
    expected = teacher(inputs).logits
    (slope,) = torch.autograd.grad(expected.square().sum(), inputs)
    teacher.shortcut.fold = True
    answer = teacher(inputs).logits
    (folded_slope,) = torch.autograd.grad(answer.square().sum(), inputs)
    assert relative(expected, answer) < ROUNDING
    assert relative(slope, folded_slope) < ROUNDING
    assert norms.during(lambda: teacher(inputs)) == left


def test_linear_and_affine_free_layers_fold_too():
    net = used(
        nn.Sequential(
            nn.Conv1d(2, 4, 3, bias=False),
            nn.BatchNorm1d(4, affine=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 5),
            nn.BatchNorm1d(5),
        )
    )
    inputs = torch.randn(6, 2, 8)
    twin = folded(net, [inputs])
    assert twin is not None
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in twin.modules())
    assert relative(net(inputs), twin(inputs)) < ROUNDING


class Branches(nn.Module):
    """Its control flow depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.body(inputs).mean((2, 3))
        return self.head(features if features.sum() > 0 else -features)


class Kinds(Branches):
    """Tells a stand-in from a tensor, so that tracing sees the wrong branch."""

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.body(inputs).mean((2, 3))
        return self.head(features) if isinstance(inputs, Tensor) else self.head(2 * features)


class Shared(Branches):
    """One convolution feeds two places, one BatchNorm is used twice."""

    def forward(self, inputs: Tensor) -> Tensor:
        conv, norm = self.body[0], self.body[1]
        first = conv(inputs)
        return self.head((norm(first) + norm(conv(-inputs)) + first).mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Branches, "cannot be traced"),
        (Kinds, "answers differ"),
        (Shared, "none follows"),
        (lambda: Branches().half(), "low precision"),
    ],
)
def test_what_cannot_be_folded_stays_and_the_log_says_why(network, reason, caplog):
    net = used(network())
    teacher = WhiteBoxTeacher(net)
    teacher.shortcut.fold = True
    inputs = torch.randn(4, 3, 8, 8, dtype=next(net.parameters()).dtype)
    expected = net(inputs)
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        assert torch.equal(teacher(inputs).logits, expected.float())
        teacher(inputs)
    assert [reason in record.message for record in caplog.records] == [True]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_probe_looks_into_the_network_itself(norms):
    net = used(ConvNet(3, 10, widths=(4, 8)))
    teacher, inputs = WhiteBoxTeacher(net), torch.randn(4, 3, 16, 16)
    with BatchNormProbe(teacher) as probe:
        teacher(inputs)
    expected = probe.observed()
    teacher.shortcut.fold = True
    assert norms.during(lambda: teacher(inputs)) == 2  # the comparison with the twin
    assert norms.during(lambda: teacher(inputs)) == 0
    with BatchNormProbe(teacher) as probe:
        teacher(inputs)
    for one, other in zip(expected, probe.observed(), strict=True):
        assert torch.equal(one.mean, other.mean) and torch.equal(one.var, other.var)
    assert norms.during(lambda: teacher(inputs)) == 0


def test_the_twin_is_no_part_of_the_teacher():
    teacher = WhiteBoxTeacher(used(ConvNet(3, 10, widths=(4, 8))))
    before = (fingerprint(teacher), count_parameters(teacher), len(list(teacher.modules())))
    teacher.shortcut.fold = True
    teacher(torch.randn(4, 3, 16, 16))
    assert (fingerprint(teacher), count_parameters(teacher), len(list(teacher.modules()))) == before


def test_a_weight_that_changed_leaves_no_stale_twin():
    net = used(ConvNet(3, 10, widths=(4, 8)))
    teacher, inputs = WhiteBoxTeacher(net), torch.randn(4, 3, 16, 16)
    teacher.shortcut.fold = True
    changes = [
        lambda: net.body[1].running_mean.add_(1),
        lambda: net.load_state_dict(used(ConvNet(3, 10, widths=(4, 8))).state_dict()),
        lambda: setattr(net.body[0], "weight", nn.Parameter(net.body[0].weight.flip(0), False)),
        lambda: net.classifier.__init__(8, 3),
        teacher.double,
    ]
    before = teacher(inputs).logits
    for change in changes:
        change()
        net.requires_grad_(False)
        inputs = inputs.to(next(net.parameters()).dtype)
        answer = teacher(inputs).logits
        assert relative(net(inputs), answer) < ROUNDING
        assert answer.shape != before.shape or relative(before, answer.float()) > 1e-9
        before = answer
    assert answer.dtype == torch.float64 and answer.shape == (4, 3)


def test_other_weights_gradients_and_copies_are_its_own():
    net = used(ConvNet(3, 10, widths=(4, 8)))
    teacher, inputs = WhiteBoxTeacher(net), torch.randn(4, 3, 16, 16)
    teacher.shortcut.fold = True
    teacher(inputs)
    weight = (2 * net.classifier.weight).requires_grad_()
    elsewhere = functional(teacher, {"module.classifier.weight": weight})
    answer = elsewhere(inputs).logits
    answer.sum().backward()
    assert weight.grad is not None
    assert relative(answer, 2 * net(inputs) - net.classifier.bias) < ROUNDING
    net.body[0].weight.requires_grad_(True)
    teacher(inputs).logits.sum().backward()
    assert net.body[0].weight.grad is not None
    net.requires_grad_(False)
    other = copy.deepcopy(teacher)
    other.module.classifier.weight.mul_(3)
    assert relative(other(inputs).logits, 3 * net(inputs) - 2 * net.classifier.bias) < ROUNDING
