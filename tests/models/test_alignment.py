"""The student's last layer in the teacher's form: what it computes, and what is left of it."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.functional import functional
from vestige.core.types import InputSpec
from vestige.errors import ContractError, TeacherError
from vestige.models.alignment import AlignedClassifier, ClassifierAlignment, last_linear, see
from vestige.models.factory import build_model


def student(width: int = 5, *, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, width), nn.BatchNorm1d(width), nn.Linear(width, 3, bias=bias)
    )


def target(width: int = 9, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(width, 3, bias=bias)


def images(rows: int = 7) -> Tensor:
    return torch.randn(rows, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def train(net: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(images()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width", "always"), [(5, False), (9, False), (9, True)])
def test_folding_leaves_the_answers_as_they_were(tied, bias, width, always):
    net, last = student(width, bias=bias), target()
    own, keys = net[3], list(net.state_dict())
    alignment = ClassifierAlignment(net, "3", last, tied=tied, always_project=always)
    with alignment:
        train(net)
        net.eval()
        before = net(images())
    assert net[3] is own
    assert list(net.state_dict()) == keys
    assert net[3].weight.shape == (3, width)
    # One product instead of two.
    torch.testing.assert_close(net(images()), before, rtol=0, atol=1e-5)


def test_inside_the_student_answers_by_projection_and_classifier():
    net, last = student(), target()
    with ClassifierAlignment(net, "3", last) as alignment:
        made = net[3]
        assert isinstance(made, AlignedClassifier)
        assert made.classifier.weight.shape == (3, 9)
        assert made.projection.weight.shape == (9, 5)
        assert made.projection.bias is None
        # It starts as the teacher's.
        assert torch.equal(made.classifier.weight, last.weight)
        assert torch.equal(made.classifier.bias, last.bias)
        assert made.classifier.weight is not last.weight
        net.eval()
        features = net[:3](images())
        by_hand = F.linear(features @ made.projection.weight.t(), last.weight, last.bias)
        torch.testing.assert_close(net(images()), by_hand)
        assert alignment.inside == "3.classifier"
        assert dict(net.named_modules())["3.classifier"] is made.classifier


def test_features_of_one_width_need_no_projection():
    net, last = student(9), target(9)
    with ClassifierAlignment(net, "3", last):
        assert isinstance(net[3].projection, nn.Identity)
        net.eval()
        torch.testing.assert_close(net(images()), last(net[:3](images())))
    with ClassifierAlignment(net, "3", last, always_project=True):
        assert isinstance(net[3].projection, nn.Linear)


def test_a_tied_classifier_does_not_move_and_the_rest_does():
    net, last = student(), target()
    alignment = ClassifierAlignment(net, "3", last, tied=True)
    with alignment:
        before = parameters(net)
        train(net)
        after = parameters(net)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"3.projection.weight", "1.weight"} <= moved
    assert not {"3.classifier.weight", "3.classifier.bias"} & moved
    assert net[3].weight.requires_grad
    torch.testing.assert_close(net[3].weight, last.weight @ after["3.projection.weight"])


def test_a_student_that_learned_nothing_gets_its_layer_back_as_it_was():
    net = student()
    before = parameters(net)
    with ClassifierAlignment(net, "3", target()):
        net(images())
    assert torch.equal(net[3].weight, before["3.weight"])
    assert torch.equal(net[3].bias, before["3.bias"])


def test_an_error_inside_folds_as_well():
    net = student()
    own = net[3]
    with pytest.raises(ZeroDivisionError), ClassifierAlignment(net, "3", target()):
        train(net)
        raise ZeroDivisionError
    assert net[3] is own


def test_biases_that_only_one_has():
    net = student()
    with ClassifierAlignment(net, "3", target(bias=False)):
        assert not net[3].classifier.bias.any()
    bare = student(bias=False)
    with ClassifierAlignment(bare, "3", target()):
        assert bare[3].classifier.bias is None


def test_a_bias_that_is_left_out_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        ClassifierAlignment(student(), "3", target())
        assert not caplog.records
        ClassifierAlignment(student(bias=False), "3", target())
    assert "the student's last layer has no bias" in caplog.text


def test_it_works_on_a_layer_deep_inside():
    net = nn.Module()
    net.head = nn.Module()
    net.head.fc = nn.Linear(4, 3)
    own = net.head.fc
    with ClassifierAlignment(net, "head.fc", target()):
        assert isinstance(net.head.fc, AlignedClassifier)
    assert net.head.fc is own


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(TeacherError, match="got '2', a BatchNorm1d, as the last layer"):
        ClassifierAlignment(student(), "2", target())
    with pytest.raises(TeacherError, match="got '', a Linear, as the last layer"):
        ClassifierAlignment(nn.Linear(4, 3), "", target())
    with pytest.raises(TeacherError, match="of 3 logits in the student and of 4 in the teacher"):
        ClassifierAlignment(student(), "3", nn.Linear(9, 4))
    alignment = ClassifierAlignment(student(), "3", target())
    with alignment, pytest.raises(ContractError, match="entered already"), alignment:
        pass


# Finding the last layer


def test_the_last_linear_layer_is_the_one_that_makes_the_logits():
    assert last_linear(student(), (3, 2, 2)) == "3"
    spec = InputSpec.image(1, 16, 16)
    assert last_linear(build_model("convnet", spec, 10), (1, 16, 16)) == "classifier"


def test_a_layer_that_does_not_make_the_logits_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.LogSoftmax(1))
    message = r"got '1' as the last layer of the student .*as student_layer"
    with pytest.raises(TeacherError, match=message):
        last_linear(net, (3, 2, 2), whose="student")
    with pytest.raises(TeacherError, match=r"got '1' as the last layer of the teacher"):
        last_linear(student(), (3, 2, 2), "1")
    with pytest.raises(TeacherError, match=r"got layer '2' .*expected a linear layer"):
        last_linear(student(), (3, 2, 2), "2")


def test_looking_for_the_last_layer_changes_nothing():
    net = student()
    before = parameters(net)
    last_linear(net, (3, 2, 2))
    after = parameters(net)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(layer.training for layer in net.modules())


# Looking at a student


def test_two_batches_pass_together_or_apart():
    net, other = student(), images(4) * 3 + 1
    twin = copy.deepcopy(net)
    joined = see(net, net, images(), other, features="3")
    torch.testing.assert_close(joined.logits, twin(torch.cat([images(), other])))
    assert torch.equal(net[2].running_mean, twin[2].running_mean)

    net = student()
    twin, alone = copy.deepcopy(net), copy.deepcopy(net)
    apart = see(net, net, images(), other, apart=True, features="3")
    torch.testing.assert_close(apart.logits, torch.cat([twin(images()), twin(other)]))
    # The running statistics are those of the first alone.
    alone(images())
    assert all(
        torch.equal(one, two) for one, two in zip(net.buffers(), alone.buffers(), strict=True)
    )
    assert not torch.equal(net[2].running_mean, twin[2].running_mean)


def test_features_and_classifier_are_those_of_the_model_that_runs():
    net = student()
    with ClassifierAlignment(net, "3", target()) as alignment:
        net.eval()
        names = {"features": "3", "aligned": alignment.inside}
        live = see(net, net, images(), images(2), **names)
        features = net[:3](torch.cat([images(), images(2)]))
        torch.testing.assert_close(live.features, features)
        assert live.aligned is not None
        torch.testing.assert_close(live.aligned.inputs, net[3].projection(features))
        assert live.aligned.weight is net[3].classifier.weight
        moved = {"3.classifier.weight": torch.ones(3, 9)}
        elsewhere = see(net, functional(net, moved), images(), **names)
        assert elsewhere.aligned is not None
        assert elsewhere.aligned.weight is moved["3.classifier.weight"]
        assert elsewhere.logits.shape == (7, 3)


def test_who_does_not_ask_sees_logits_alone():
    net = student()
    seen = see(net, net, images())
    assert seen.features is None
    assert seen.aligned is None
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in net.modules())
