"""Networks cut into blocks: the composition, the weights, and what is refused."""

import pytest
import torch
from torch import nn

from vestige.core.types import InputSpec
from vestige.errors import RecipeError
from vestige.models.blocks import Blocks
from vestige.models.factory import build_model

SPEC = InputSpec.image(2, 16, 16)
LENET = [
    ["body.0", "body.1", "body.2"],
    ["body.3", "body.4", "body.5"],
    ["body.6", "body.7", "body.8"],
    ["body.9", "body.10"],
    ["classifier"],
]


def block_cnn() -> nn.Module:
    return build_model("block-cnn", SPEC, 5, widths=[4, 6, 6], hidden=7, groups=2)


NETWORKS = {
    "block-cnn": (block_cnn, None, [(4, 8, 8), (6, 4, 4), (6, 4, 4), (7,), (5,)]),
    "lenet5": (
        lambda: build_model("lenet5", SPEC, 5),
        LENET,
        [(6, 6, 6), (16, 1, 1), (120,), (84,), (5,)],
    ),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_trunk_and_tail_compute_what_the_network_does_at_every_cut(name):
    build, names, shapes = NETWORKS[name]
    network = build()
    blocks = Blocks(network, names)
    assert blocks.shapes(SPEC) == shapes
    inputs = torch.randn(3, *SPEC.shape)
    for cut in range(1, len(blocks)):
        trunk, tail = blocks.split_at(cut)
        middle = trunk(inputs)
        assert middle.shape == (3, *shapes[cut - 1])
        assert torch.equal(tail(middle), network(inputs))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_segments_hold_the_networks_own_weights_under_its_names(name):
    build, names, _ = NETWORKS[name]
    network = build()
    whole = network.state_dict(keep_vars=True)
    for cut in range(1, 5):
        trunk, tail = Blocks(network, names).split_at(cut)
        parts = {**trunk.state_dict(keep_vars=True), **tail.state_dict(keep_vars=True)}
        assert list(parts) == list(whole)
        assert all(parts[key] is whole[key] for key in whole)
        assert not set(trunk.state_dict()) & set(tail.state_dict())


def test_children_without_weights_join_the_block_before():
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(512, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)
    )
    assert Blocks(network).names == (("0", "1", "2"), ("3", "4"), ("5",))


def test_looking_at_shapes_leaves_network_and_randomness_alone():
    network = nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(512, 4)),
        nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)),
    ).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    drawn = torch.get_rng_state()
    Blocks(network).shapes(SPEC)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(layer.training for layer in network.modules())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.second(self.first(inputs))


def test_modules_that_do_not_make_up_the_forward_are_refused():
    spec = InputSpec("embedding", (4,))
    with pytest.raises(RecipeError, match="but their output is another one"):
        Blocks(Residual(), [["first"], ["second"]]).shapes(spec)
    # Global pooling lies between the children of this one.
    convnet = build_model("convnet", SPEC, 3, widths=[4, 8])
    with pytest.raises(RecipeError, match=r"block 2 \['classifier'\] fails"):
        Blocks(convnet, [["body"], ["classifier"]]).shapes(SPEC)


def test_what_are_no_blocks_is_refused():
    network = Residual()
    with pytest.raises(RecipeError, match="got a Residual, expected an"):
        Blocks(network)
    with pytest.raises(RecipeError, match=r"modules \['third'\].*'first', 'second'"):
        Blocks(network, [["first"], ["third"]])
    with pytest.raises(RecipeError, match=r"leave out \['0.second.weight', '0.second.bias'\]"):
        Blocks(nn.Sequential(network), [["0.first"], ["0.first"]])
    with pytest.raises(RecipeError, match="share a weight"):
        Blocks(network, [["first", "second"], ["first"]])
    with pytest.raises(RecipeError, match="got 1 blocks"):
        Blocks(network, [["first", "second"]])
    for cut in (0, 2):
        with pytest.raises(RecipeError, match=f"got cut {cut} of 2 blocks, expected 1 to 1"):
            Blocks(network, [["first"], ["second"]]).split_at(cut)
