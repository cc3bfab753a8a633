from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.core.types import InputSpec
from vestige.errors import CheckpointError, DataError, NonFiniteLossError, ShapeError
from vestige.tasks.classification import Classification
from vestige.tasks.segmentation import Segmentation
from vestige.training.checkpoint import CheckpointStore
from vestige.training.supervised import random_flip, random_shift, train_classifier

SPEC = InputSpec.image(1, 8, 8)


def bars(count: int) -> tuple[Tensor, Tensor]:
    """Three kinds of noisy images: a bright row, a bright column, neither."""
    labels = torch.arange(count) % 3
    inputs = 0.3 * torch.randn(count, 1, 8, 8)
    inputs[labels == 0, :, 3] += 1
    inputs[labels == 1, :, :, 3] += 1
    return inputs, labels


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(72, 3),
    )


def test_it_learns() -> None:
    module, task = network(), Classification(SPEC, 3)
    train, test = bars(300), bars(99)
    losses: list[tuple[int, float]] = []
    train_classifier(
        module, *train, epochs=6, batch_size=32, on_epoch=lambda *loss: losses.append(loss)
    )
    assert task.evaluate(module, test)["accuracy"] > 0.9  # a third by chance
    assert [epoch for epoch, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[-1][1] < 0.5 * losses[0][1]
    assert not any(layer.training for layer in module.modules())


@pytest.mark.parametrize("shift", [0, 2])
def test_the_seed_decides_everything_random(shift: int) -> None:
    def trained(seed: int, state: int) -> Tensor:
        module = network()
        torch.manual_seed(state)  # dropout must not depend on what ran before
        train_classifier(module, *data, epochs=2, batch_size=16, shift=shift, seed=seed)
        return nn.utils.parameters_to_vector(module.parameters())

    data = bars(64)
    first = trained(seed=5, state=1)
    assert torch.equal(first, trained(seed=5, state=2))
    assert not torch.equal(first, trained(seed=6, state=1))


def test_global_generators_are_left_alone() -> None:
    module, data = network(), bars(32)
    state = torch.get_rng_state()
    train_classifier(module, *data, epochs=1, batch_size=16)
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_batchnorm_stays_frozen() -> None:
    module = network()
    module[1].eval().requires_grad_(False)
    before = module[1].running_mean.clone()
    train_classifier(module, *bars(32), epochs=1, batch_size=16)
    assert torch.equal(module[1].running_mean, before)


def test_each_image_moves_on_its_own_by_all_shifts() -> None:
    images = torch.arange(36.0).view(1, 1, 6, 6).expand(600, 2, 6, 6)
    moved = random_shift(images, 1, torch.Generator().manual_seed(0))
    padded = functional.pad(images[:1], (1, 1, 1, 1), mode="replicate")
    crops = [padded[0, :, y : y + 6, x : x + 6] for y in range(3) for x in range(3)]
    matches = torch.stack([(moved == crop).flatten(1).all(1) for crop in crops])
    assert torch.equal(matches.sum(0), torch.ones(600, dtype=torch.int64))
    # Nine shifts, 67 expected each with deviation 7.7: five deviations.
    assert ((matches.sum(1) - 600 / 9).abs() < 39).all()


def test_the_last_batch_is_full() -> None:
    sizes: list[int] = []

    class Watched(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            sizes.append(len(inputs))
            return super().forward(inputs)

    train_classifier(
        Watched(4, 3), torch.randn(70, 4), torch.randint(3, (70,)), epochs=2, batch_size=32
    )
    assert sizes == [32] * 4
    sizes.clear()
    train_classifier(
        Watched(4, 3), torch.randn(5, 4), torch.randint(3, (5,)), epochs=1, batch_size=32
    )
    assert sizes == [5]


def test_mistakes_are_refused() -> None:
    inputs, labels = torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.raises(DataError, match="no inputs"):
        train_classifier(nn.Linear(4, 3), inputs[:0], labels[:0], epochs=1)
    with pytest.raises(ShapeError, match=r"labels of shape \(5,\), expected \(6,\)"):
        train_classifier(nn.Linear(4, 3), inputs, labels[:5], epochs=1)
    with pytest.raises(ShapeError, match="set shift=0"):
        train_classifier(nn.Linear(4, 3), inputs, labels, epochs=1, shift=1)
    with pytest.raises(DataError, match="epochs=0"):
        train_classifier(nn.Linear(4, 3), inputs, labels, epochs=0)
    with pytest.raises(NonFiniteLossError, match="epoch 1"):
        train_classifier(nn.Linear(4, 3), inputs * float("inf"), labels, epochs=1)


SGD = {"optimizer": "sgd", "lr": 0.05, "nesterov": True, "weight_decay": 5e-4}


@pytest.mark.parametrize(
    "settings",
    [{"shift": 1}, {**SGD, "shift": 1, "flip": True, "channels_last": True, "precision": "bf16"}],
    ids=["adamw", "sgd"],
)
def test_broken_off_and_resumed_it_ends_bit_identical(settings: dict, tmp_path: Path) -> None:
    data = bars(64)

    def trained(store: CheckpointStore | None, stop_after: int) -> tuple[bool, dict[str, Tensor]]:
        epochs = iter(range(1, 5))
        module = network()
        whole = train_classifier(
            module,
            *data,
            epochs=4,
            batch_size=16,
            **settings,
            store=store,
            go_on=lambda: next(epochs) != stop_after,
        )
        return whole, module.state_dict()

    whole, wanted = trained(None, 0)
    assert whole
    store = CheckpointStore(tmp_path)
    assert not trained(store, 1)[0]
    torch.manual_seed(99)  # what happened in between must not matter
    assert not trained(store, 2)[0]
    done, found = trained(store, 0)
    assert done
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    store, data = CheckpointStore(tmp_path), bars(32)
    train_classifier(network(), *data, epochs=1, batch_size=16, store=store)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(CheckpointError, match="does not fit this training"):
        train_classifier(other, *data, epochs=2, batch_size=16, store=store)


def test_the_layout_is_given_back() -> None:
    module = network()
    stride = module[0].weight.stride()
    train_classifier(module, *bars(32), epochs=1, batch_size=16, channels_last=True)
    assert module[0].weight.stride() == stride


def test_sgd_steps_as_its_formula_says() -> None:
    module = nn.Linear(2, 2, bias=False)
    before = module.weight.detach().clone()
    inputs, labels = torch.tensor([[1.0, 2.0]]), torch.tensor([0])
    weight = before.clone().requires_grad_()
    loss = functional.cross_entropy(inputs @ weight.T, labels, label_smoothing=0.2)
    (grad,) = torch.autograd.grad(loss, weight)
    train_classifier(
        module, inputs, labels, epochs=1, optimizer="sgd", lr=0.1, momentum=0.0,
        weight_decay=0.5, label_smoothing=0.2,
    )  # fmt: skip
    assert torch.allclose(module.weight, before - 0.1 * (grad + 0.5 * before), atol=1e-7)


def test_about_half_of_the_images_are_mirrored_and_the_rest_left_alone() -> None:
    images = torch.randn(400, 2, 3, 4)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert torch.equal(mirrored, ~kept)
    assert 150 < int(mirrored.sum()) < 250  # 200 expected with deviation 10


# Masks


def squares(count: int) -> tuple[Tensor, Tensor]:
    """Bright squares on noise, and where they are; the right edge of each mask is ignored."""
    masks = torch.zeros(count, 8, 8, dtype=torch.long)
    for mask in masks:
        top, left = torch.randint(5, (2,)).tolist()
        mask[top : top + 3, left : left + 3] = 1
    inputs = 0.3 * torch.randn(count, 1, 8, 8) + masks[:, None]
    masks[:, :, 7] = 255
    return inputs, masks


def dense(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1)
    )


@pytest.mark.parametrize("focal_gamma", [0.0, 2.0])
def test_it_learns_masks(focal_gamma: float) -> None:
    module, losses = dense(), []
    train_classifier(
        module,
        *squares(100),
        epochs=6,
        batch_size=20,
        shift=1,
        flip=True,
        lr=1e-2,
        focal_gamma=focal_gamma,
        ignore_index=255,
        on_epoch=lambda _, loss: losses.append(loss),
    )
    scores = Segmentation(SPEC, 2).evaluate(module, squares(50))
    # Taking everything for background scores 0.42.
    assert scores["miou"] > 0.8
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_ignored_moves_no_weight() -> None:
    def trained(value: float, shift: int = 0) -> Tensor:
        inputs, masks = torch.zeros(32, 1, 8, 8), torch.full((32, 8, 8), 255)
        inputs[:, :, :, :4] = torch.linspace(-1, 1, 32).view(-1, 1, 1, 1)
        masks[:, :, 0] = torch.arange(32)[:, None] % 2
        # Too far for a 3x3 convolution to reach what is judged.
        inputs[:, :, :, 6:] = value
        torch.manual_seed(0)
        module = nn.Conv2d(1, 2, 3, padding=1)
        train_classifier(
            module, inputs, masks, epochs=2, batch_size=16, shift=shift, ignore_index=255
        )
        return nn.utils.parameters_to_vector(module.parameters())

    assert torch.equal(trained(0.0), trained(100.0))


@pytest.mark.parametrize("focal_gamma", [0.0, 2.0])
def test_loss_is_the_mean_over_what_is_not_ignored(focal_gamma: float) -> None:
    logits, masks = torch.randn(8, 3, 2, 2), torch.randint(3, (8, 2, 2))
    masks[:, 0, 0] = 255

    class Told(nn.Module):
        """Its inputs are its logits; one weight that has no effect."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {"out": inputs + 0 * self.weight}

    losses: list[float] = []
    train_classifier(
        Told(),
        logits,
        masks,
        epochs=1,
        batch_size=8,
        focal_gamma=focal_gamma,
        ignore_index=255,
        on_epoch=lambda _, loss: losses.append(loss),
    )
    kept = masks != 255
    right = logits.softmax(1).permute(0, 2, 3, 1)[kept][range(int(kept.sum())), masks[kept]]
    expected = (-((1 - right) ** focal_gamma) * right.log()).mean()
    assert losses == [pytest.approx(expected.item(), rel=1e-5)]


def test_a_batch_of_nothing_but_ignored_pixels_is_no_failure() -> None:
    inputs, masks = squares(8)
    masks[:4] = 255
    for gamma in (0.0, 0.5):
        module = dense()
        train_classifier(
            module, inputs, masks, epochs=1, batch_size=1, ignore_index=255, focal_gamma=gamma
        )
        assert all(torch.isfinite(weight).all() for weight in module.parameters())


def test_masks_that_do_not_fit_are_named() -> None:
    inputs, masks = squares(4)
    with pytest.raises(DataError, match=r"label 255 and 2 logits.*ignore_index"):
        train_classifier(dense(), inputs, masks, epochs=1)
    with pytest.raises(ShapeError, match=r"logits of shape \(4, 2, 8, 8\) for labels of shape"):
        train_classifier(dense(), inputs, masks[:, 0, 0] * 0, epochs=1)
    with pytest.raises(ShapeError, match=r"\(4, 3\) for labels of shape \(4, 8, 8\)"):
        train_classifier(network(), inputs, masks, epochs=1, ignore_index=255)
    with pytest.raises(ShapeError, match="masks of their size"):
        train_classifier(dense(), inputs, masks[:, :4], epochs=1)
    with pytest.raises(DataError, match=r"focal_gamma=1\.0, label_smoothing=0\.1"):
        train_classifier(dense(), inputs, masks, epochs=1, focal_gamma=1.0, label_smoothing=0.1)


class Speaker(nn.Module):
    """A network with a loss of its own, on labels of any shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.seen: list[tuple[torch.Size, torch.Size]] = []

    def training_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self.seen.append((inputs.shape, labels.shape))
        return (self.weight - labels.float().mean(0)).square().sum()


def test_a_network_with_a_loss_of_its_own_is_trained_by_that() -> None:
    speaker, labels = Speaker(), torch.arange(4).repeat(20, 1).byte()
    inputs = torch.zeros(20, 7, dtype=torch.uint8)
    done = train_classifier(speaker, inputs, labels, epochs=60, batch_size=5, lr=0.1, seed=0)
    assert done and not speaker.training
    assert set(speaker.seen) == {((5, 7), (5, 4))}
    torch.testing.assert_close(speaker.weight.detach(), torch.arange(4.0), atol=0.2, rtol=0)


def test_what_a_loss_of_its_own_would_ignore_is_refused() -> None:
    inputs, labels = torch.zeros(4, 7), torch.zeros(4, 2)
    for wrong in ({"focal_gamma": 1.0}, {"label_smoothing": 0.1}):
        with pytest.raises(DataError, match="Speaker, which has a loss of its own"):
            train_classifier(Speaker(), inputs, labels, epochs=1, batch_size=2, seed=0, **wrong)
    with pytest.raises(ShapeError, match="got 3 labels for 4 inputs"):
        train_classifier(Speaker(), inputs, labels[:3], epochs=1, batch_size=2, seed=0)
