"""Patches are as large and as far apart as the paper has them."""

import pytest
import torch
from torch import nn

from vestige.errors import ShapeError
from vestige.models.discriminators import PatchDiscriminator, patch_discriminator


@pytest.mark.parametrize(
    ("name", "stride", "field", "grid"), [("patch", 4, 10, 16), ("deep", 8, 22, 8)]
)
def test_a_logit_sees_its_patch_and_nothing_else(name, stride, field, grid):
    made = patch_discriminator(name, 3, width=4).eval()
    assert (made.stride, made.receptive_field) == (stride, field)
    inputs = torch.randn(1, 3, 64, 64, requires_grad=True)
    logits = made(inputs)
    assert logits.shape == (1, 1, grid, grid)
    assert made.patches((64, 64)) == grid**2
    for row, column in ((3, 4), (4, 2)):
        (grad,) = torch.autograd.grad(logits[0, 0, row, column], inputs, retain_graph=True)
        rows, columns = grad[0].abs().sum(0).nonzero().unbind(1)
        # Each convolution of 4 with padding 1 begins one of its pixels before its place.
        first = [place * stride - (stride - 1) for place in (row, column)]
        assert [rows.min(), columns.min()] == first
        assert [rows.max() + 1 - rows.min(), columns.max() + 1 - columns.min()] == [field, field]


def test_neighbouring_patches_are_one_stride_apart():
    made = patch_discriminator("patch", 1, width=4).eval()
    inputs = torch.randn(1, 1, 32, 32)
    moved = torch.roll(inputs, made.stride, 3)
    # Away from the border, where there is padding.
    torch.testing.assert_close(made(moved)[..., 2:-2, 3:-2], made(inputs)[..., 2:-2, 2:-3])


@pytest.mark.parametrize(
    ("name", "widths", "parameters"),
    [
        # 3*128*16 + 128, 128*256*16, 2*256 of BatchNorm, 256
        ("patch", [128, 256, 1], 531_328),
        # 3*64*16, 64*128*16 + 2*128, 128*256*16 + 2*256, 256
        ("deep", [64, 128, 256, 1], 659_456),
        ("deeper", [64, 128, 256, 512, 1], 2_757_888),
    ],
)
def test_the_reference_codes_networks(name, widths, parameters):
    made = patch_discriminator(name, 3)
    layers = [layer for layer in made.body if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in layers] == widths
    assert sum(weight.numel() for weight in made.parameters()) == parameters
    assert [layer.bias is not None for layer in layers] == [
        name == "patch",
        *[False] * (len(widths) - 1),
    ]
    assert not isinstance(made.body[1], nn.BatchNorm2d)


def test_an_image_without_a_whole_patch_is_refused():
    with pytest.raises(ShapeError, match="6x40 for a discriminator of stride 8"):
        PatchDiscriminator(3, width=4, depth=3).patches((6, 40))
