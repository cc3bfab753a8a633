"""Many networks together answer as each does alone."""

import pytest
import torch
from torch import Tensor, nn

from vestige.core.federation import ClientUpdate
from vestige.core.types import InputSpec
from vestige.federated.stacked import ClientEnsemble, StackedNetworks
from vestige.models.factory import build_model

SPEC = InputSpec.image(1, 8, 8)


def networks(norm: str, count: int = 5) -> list[nn.Module]:
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        one = build_model("convnet", SPEC, 3, widths=[4, 8], norm=norm)
        for layer in one.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean = torch.randn(layer.num_features)
                layer.running_var = torch.rand(layer.num_features) + 0.5
        made.append(one.eval())
    return made


def slopes(logits: Tensor, inputs: Tensor) -> Tensor:
    weights = torch.arange(logits.numel(), dtype=torch.float32).view(logits.shape) / 10
    return torch.autograd.grad((weights * logits).sum(), inputs)[0]


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("chunk", [1, 2, 5, 9])
def test_it_is_the_loop(norm, chunk):
    each = networks(norm)
    stacked = StackedNetworks(each[0], [one.state_dict() for one in each], chunk=chunk)
    inputs = torch.randn(6, *SPEC.shape, requires_grad=True)
    expected, found = torch.stack([one(inputs) for one in each]), stacked(inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        slopes(found, inputs), slopes(expected, inputs), atol=1e-5, rtol=1e-5
    )
    some = stacked(inputs, range(1, 4))
    torch.testing.assert_close(some, expected[1:4], atol=1e-5, rtol=0)


class Tied(nn.Module):
    """Two layers with the same weight, which its state names twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(self.first(inputs[:, 0, 0]).relu()).relu())


@pytest.mark.parametrize("chunk", [1, 3])
def test_networks_with_shared_weights_share_them(chunk):
    each = [Tied().eval() for _ in range(3)]
    stacked = StackedNetworks(each[0], [one.state_dict() for one in each], chunk=chunk)
    inputs = torch.randn(6, *SPEC.shape)
    expected = torch.stack([one(inputs) for one in each])
    torch.testing.assert_close(stacked(inputs), expected, atol=1e-6, rtol=0)


class Recurrent(nn.Module):
    """torch has no batched form of its GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.gru(inputs[:, 0])[0][:, -1])


def test_what_torch_cannot_batch_is_called_one_after_another():
    each = [Recurrent().eval() for _ in range(5)]
    stacked = StackedNetworks(each[0], [one.state_dict() for one in each], chunk=3)
    inputs = torch.randn(6, *SPEC.shape)
    for members in (None, range(1, 4)):
        expected = torch.stack([one(inputs) for one in each])[slice(*(1, 4) if members else (5,))]
        torch.testing.assert_close(stacked(inputs, members), expected, atol=1e-6, rtol=0)


def test_it_neither_learns_nor_looks_at_the_form_it_was_made_from():
    each = networks("batch", 2)
    form = networks("batch", 3)[2].train()
    before = {name: value.clone() for name, value in form.state_dict().items()}
    stacked = StackedNetworks(form, [one.state_dict() for one in each], chunk=2)
    with torch.no_grad():
        for value in form.parameters():
            value.zero_()
    inputs = torch.randn(6, *SPEC.shape, requires_grad=True)
    found = stacked(inputs)
    torch.testing.assert_close(found, torch.stack([one(inputs) for one in each]), atol=1e-5, rtol=0)
    found.sum().backward()
    assert inputs.grad is not None
    assert all(value.grad is None for value in [*form.parameters(), *stacked.form.parameters()])
    assert form.training
    statistics = [name for name in before if "running" in name or "tracked" in name]
    assert all(torch.equal(before[name], form.state_dict()[name]) for name in statistics)


def test_what_a_state_lacks_is_the_forms():
    form, other = networks("batch", 2)
    short = {n: v for n, v in other.state_dict().items() if "running" not in n}
    mixed = networks("batch", 1)[0]
    mixed.load_state_dict({**form.state_dict(), **short})
    inputs = torch.randn(6, *SPEC.shape)
    found = StackedNetworks(form, [short], chunk=1)(inputs)[0]
    assert torch.equal(found, mixed(inputs))


def ensemble(counts: list[list[int]], *, by_counts: bool = True) -> ClientEnsemble:
    each = networks("group", len(counts))
    updates = [
        ClientUpdate(k, {"model": one.state_dict()}, sum(row), torch.tensor(row), {})
        for k, (one, row) in enumerate(zip(each, counts, strict=True))
    ]
    return ClientEnsemble.of(updates, each[0], by_counts=by_counts, chunk=2, device="cpu")


@pytest.mark.parametrize("by_counts", [True, False])
def test_labels_are_drawn_from_what_the_clients_have(by_counts):
    made = ensemble([[60, 0, 0], [10, 30, 0]])
    first, again = (
        made.labels(500, torch.Generator().manual_seed(0), by_counts=by_counts) for _ in range(2)
    )
    assert torch.equal(first, again)
    found = torch.bincount(first, minlength=3)
    assert len(first) == 500
    assert found[2] == 0
    if by_counts:
        assert (found - torch.tensor([350, 150, 0])).abs().max() <= 1
    else:
        # Four standard deviations of 500 tosses of a coin.
        assert (found[0] - 250).abs() < 45
    # Shuffled: no batch holds one class alone.
    assert all(len(part.unique()) == 2 for part in first.split(50))


def test_shares_go_by_counts_or_are_equal():
    counts = [[3, 0, 0], [1, 2, 0]]
    assert ensemble(counts).shares.tolist() == [[0.75, 0.0, 0.0], [0.25, 1.0, 0.0]]
    assert ensemble(counts, by_counts=False).shares.tolist() == [[0.5] * 3] * 2


def test_members_take_turns_or_not():
    made = ensemble([[1, 1, 1]] * 3)
    assert made.turns(one_by_one=False) == [range(3)]
    assert made.turns(one_by_one=True) == [range(1), range(1, 2), range(2, 3)]


def test_each_client_speaks_about_the_classes_that_it_has():
    made = ensemble([[4, 0, 2], [0, 3, 2]])
    inputs, labels = torch.randn(3, *SPEC.shape), torch.arange(3)
    each = [one(inputs).softmax(1) for one in networks("group", 2)]
    expected = torch.stack([each[0][0], each[1][1], (each[0][2] + each[1][2]) / 2])
    torch.testing.assert_close(made.probabilities(inputs, labels), expected, atol=1e-6, rtol=0)
