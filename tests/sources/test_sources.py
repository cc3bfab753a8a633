from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vestige.core.protocols import Source, Stateful
from vestige.core.types import InputSpec
from vestige.errors import DataError
from vestige.models.factory import build_generator
from vestige.sources.generator import GeneratorSource
from vestige.sources.images import TensorSource
from vestige.sources.noise import NoiseSource

SPEC = InputSpec.image(2, 16, 16, mean=(0.3, 0.5), std=(0.2, 0.4))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generator() -> nn.Module:
    return build_generator("upsample", SPEC, latent_dim=8, width=4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NoiseSource(SPEC),
        lambda: NoiseSource(SPEC, distribution="uniform"),
        lambda: GeneratorSource(generator()),
        lambda: TensorSource(torch.randn(5, 2, 16, 16), origin="foreign", name="mine"),
    ],
)
def test_draws_depend_on_the_generator_handed_in_alone(make: object) -> None:
    source: Source = make()  # type: ignore[operator]
    state = torch.get_rng_state()
    first = source.draw(6, rng())
    assert first.shape == (6, 2, 16, 16) and first.dtype == torch.float32
    assert not first.requires_grad
    assert torch.equal(first, source.draw(6, rng()))
    assert not torch.equal(first, source.draw(6, rng(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert source.name and isinstance(source.paths, tuple)


def test_normal_noise_is_standard_in_normalised_space() -> None:
    inputs = NoiseSource(SPEC).draw(400, rng())
    # 205k values: six standard errors of mean and deviation are below 0.02.
    assert inputs.mean().abs() < 0.02 and (inputs.std() - 1).abs() < 0.02
    assert NoiseSource(SPEC).origin == "noise"


def test_uniform_noise_fills_the_range_of_images() -> None:
    inputs = NoiseSource(SPEC, distribution="uniform").draw(400, rng())
    low, high = SPEC.normalize(torch.zeros(1, 2, 1, 1)), SPEC.normalize(torch.ones(1, 2, 1, 1))
    assert (inputs >= low).all() and (inputs <= high).all()
    images = inputs * torch.tensor(SPEC.std).view(-1, 1, 1) + torch.tensor(SPEC.mean).view(-1, 1, 1)
    assert (images.mean() - 0.5).abs() < 0.01
    assert images.min() < 0.001 and images.max() > 0.999


def test_unknown_distribution_is_refused() -> None:
    with pytest.raises(DataError, match="'gauss'"):
        NoiseSource(SPEC, distribution="gauss")  # type: ignore[arg-type]


def test_generator_uses_statistics_of_its_own_batch() -> None:
    source = GeneratorSource(generator().eval())
    inputs = source.draw(64, rng())
    # The generator ends in an affine-free BatchNorm: with batch statistics each channel has mean 0
    # and deviation 1 exactly, with the initial running statistics it would be far from it.
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(inputs.std((0, 2, 3)), torch.ones(2), rtol=0, atol=2e-2)
    assert source.origin == "generator"


def test_generator_state_is_a_part() -> None:
    source, other = GeneratorSource(generator()), GeneratorSource(generator())
    weights = [weight.clone() for weight in source.generator.parameters()]
    source.draw(4, rng())
    assert all(map(torch.equal, weights, source.generator.parameters()))
    assert isinstance(source, Stateful)
    other.load_state_dict(source.state_dict())
    assert torch.equal(source.draw(4, rng(3)), other.draw(4, rng(3)))
    running = [buffer for name, buffer in other.generator.named_buffers() if "running_mean" in name]
    assert all(buffer.abs().sum() > 0 for buffer in running)


def test_generator_needs_its_latent_size() -> None:
    with pytest.raises(DataError, match="latent_dim"):
        GeneratorSource(nn.Linear(3, 3))


def test_tensor_source_draws_every_row_with_replacement() -> None:
    inputs = torch.arange(10.0).view(10, 1).requires_grad_()
    source = TensorSource(inputs, origin="real", name="mine", paths=[Path("a.npz")])
    drawn = source.draw(10_000, rng())
    counts = torch.bincount(drawn[:, 0].long(), minlength=10)
    # Expected 1,000 each with deviation 30: six deviations.
    assert ((counts - 1000).abs() < 180).all()
    assert not drawn.requires_grad
    assert len(source) == 10 and source.paths == (Path("a.npz"),) and source.origin == "real"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_tensor_source_keeps_the_dtype(dtype: torch.dtype) -> None:
    inputs: Tensor = torch.ones(3, 2, dtype=dtype)
    assert TensorSource(inputs, origin="foreign", name="mine").draw(4, rng()).dtype == dtype


def test_tensor_source_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(DataError, match="origin 'stolen'"):
        TensorSource(torch.ones(3, 2), origin="stolen", name="mine")
    with pytest.raises(DataError, match=r"N > 0"):
        TensorSource(torch.ones(0, 2), origin="real", name="mine")


@pytest.mark.gpu
def test_draws_land_where_the_generator_is() -> None:
    cuda = torch.Generator("cuda").manual_seed(0)
    sources: list[Source] = [
        NoiseSource(SPEC),
        GeneratorSource(generator()),
        TensorSource(torch.randn(5, 2), origin="foreign", name="mine"),
    ]
    assert all(source.draw(3, cuda).is_cuda for source in sources)
