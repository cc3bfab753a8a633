import json
import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vestige.core.types import InputSpec
from vestige.data.image import channel_statistics, load_images, to_inputs
from vestige.errors import CheckpointError, DataError, Interrupted, RecipeError
from vestige.recipes import teacher as teacher_module
from vestige.recipes.teacher import teacher_from_recipe, train_teacher
from vestige.recipes.teacher_schema import (
    RECIPES_FOLDER,
    TeacherRecipe,
    load_teacher_recipe,
    teacher_recipes,
)
from vestige.tasks.classification import Classification
from vestige.teachers.loading import builtin_card, fingerprint, load_teacher, read_card

SHIPPED = [
    "ag-news-bert",
    "ag-news-lm",
    "ag-news-lm-50m",
    "ag-news-mentions",
    "bert-tiny",
    "camvid-deeplabv3-resnet50",
    "camvid-encoder-decoder",
    "cifar10-resnet34",
    "cifar10-six-convnet",
    "cifar10-six-wrn-40-2",
    "cifar10-wrn-40-2",
    "cifar100-wrn-40-2",
    "digits-convnet",
    "fashion-mnist-convnet",
    "fsdd-whisper",
    "fsdd-whisper-large",
    "fsdd-whisper-proxy",
    "mnist-convnet",
    "mnist-lenet5",
    "scenes-encoder-decoder",
]


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    """A recipe of seconds: the digits teacher, narrower, for one epoch."""
    values = yaml.safe_load((RECIPES_FOLDER / "digits-convnet.yaml").read_text())
    values["training"]["epochs"] = 1
    values["model"]["args"] = {"widths": [4, 8, 8]}
    path = tmp_path / "quick.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "teachers"


def write(path: Path, **changes: object) -> Path:
    values = yaml.safe_load((RECIPES_FOLDER / "digits-convnet.yaml").read_text())
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_validate_and_say_what_they_need(name: str) -> None:
    recipe = load_teacher_recipe(name)
    assert recipe.name == name
    text = (RECIPES_FOLDER / f"{name}.yaml").read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any(f"vestige train-teacher {name}" in line for line in header)
    assert any("Needs:" in line for line in header)
    assert any(
        line.startswith(("# Expected: accuracy", "# Expected: mIoU", "# Expected: WER"))
        for line in header
    )


def test_nothing_else_is_shipped() -> None:
    assert teacher_recipes() == SHIPPED


@pytest.mark.parametrize(
    "name",
    # Half a gigabyte of pixels takes a while.
    [
        pytest.param(name, marks=pytest.mark.slow if "cifar" in name or "deeplab" in name else ())
        for name in SHIPPED
        if load_teacher_recipe(name).input.spec().kind == "image"
    ],
)
def test_normalisation_is_that_of_the_training_images(name: str) -> None:
    recipe = load_teacher_recipe(name)
    try:
        splits = ("train", "select") if recipe.with_select else ("train",)
        images = np.concatenate([load_images(recipe.data, split).images for split in splits])
    except DataError as error:
        pytest.skip(str(error))
    plain = InputSpec.image(*recipe.input.spec().shape)
    mean, std = channel_statistics(to_inputs(images, plain))
    assert recipe.input.mean == pytest.approx(mean, abs=6e-5)
    assert recipe.input.std == pytest.approx(std, abs=6e-5)


def test_builtin_teacher_came_from_its_recipe_and_scores_what_the_card_says() -> None:
    recipe, card = load_teacher_recipe("digits-convnet"), builtin_card("digits-convnet")
    train, test = load_images("digits", "train"), load_images("digits", "test")
    assert card.recipe_sha256 == recipe.sha256()
    assert (card.train_fingerprint, card.test_fingerprint) == (train.fingerprint, test.fingerprint)
    spec = card.input.spec()
    data = to_inputs(test.images, spec), torch.from_numpy(test.labels)
    scores = Classification(spec, 10).evaluate(load_teacher("builtin:digits-convnet"), data)
    # Rounding may differ between machines; one of 500 images may sit on the edge.
    assert scores["accuracy"] == pytest.approx(card.accuracy, abs=0.0021)
    assert card.accuracy >= 0.985


def test_training_twice_writes_the_same_bytes(quick: Path, tmp_path: Path) -> None:
    recipe = load_teacher_recipe(quick)
    threads = torch.get_num_threads()
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)  # what ran before must not matter
        torch.set_num_threads(number + 1)
        module, card = train_teacher(recipe, tmp_path / name)
        assert torch.get_num_threads() == number + 1
    torch.set_num_threads(threads)
    for file in ("quick.safetensors", "quick.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "quick.json",
        "quick.safetensors",
    ]
    assert read_card(tmp_path / "one" / "quick.json") == card
    assert card.weights_fingerprint == fingerprint(module)
    loaded = load_teacher(
        {
            "model": card.model,
            "args": card.args,
            "weights": tmp_path / "one" / "quick.safetensors",
        },
        input_spec=card.input.spec(),
        num_classes=card.num_classes,
    )
    assert fingerprint(loaded) == card.weights_fingerprint


@pytest.mark.slow
def test_builtin_teacher_can_be_made_again(tmp_path: Path) -> None:
    module, card = train_teacher(load_teacher_recipe("digits-convnet"), tmp_path)
    shipped = builtin_card("digits-convnet")
    if card.torch != shipped.torch or card.weights_fingerprint != shipped.weights_fingerprint:
        # Other processors and versions round differently; the result must be as good.
        assert card.accuracy == pytest.approx(shipped.accuracy, abs=0.01)
    again, _ = train_teacher(load_teacher_recipe("digits-convnet"), None)
    assert fingerprint(again) == fingerprint(module)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist-convnet", "mnist-lenet5"])
def test_mnist_teachers_reach_their_figure(name: str) -> None:
    try:
        _, card = train_teacher(load_teacher_recipe(name), None)
    except DataError as error:
        pytest.skip(str(error))
    assert card.accuracy >= 0.985


def test_a_teacher_is_trained_once_and_then_cached(
    quick: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vestige")
    module, card = teacher_from_recipe(quick)
    assert "training teacher 'quick'" in caplog.text
    digest = load_teacher_recipe(quick).sha256()
    weights = cache / f"quick-{digest[:12]}.safetensors"
    assert weights.is_file() and json.loads(weights.with_suffix(".json").read_text())
    caplog.clear()
    again, card_again = teacher_from_recipe(quick)
    assert caplog.text == ""
    assert fingerprint(again) == fingerprint(module) and card_again == card

    weights.write_bytes(weights.read_bytes()[:-8])  # damaged: said, and mended
    mended, _ = teacher_from_recipe(quick)
    assert "is trained again" in caplog.text and fingerprint(mended) == fingerprint(module)


def test_another_recipe_of_the_same_name_is_another_teacher(quick: Path, cache: Path) -> None:
    teacher_from_recipe(quick)
    quick.write_text(quick.read_text() + "# a comment changes nothing\n")
    teacher_from_recipe(quick)
    assert len(list(cache.glob("*.safetensors"))) == 1
    quick.write_text(quick.read_text().replace("seed: 0", "seed: 1"))
    teacher_from_recipe(quick)
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_the_shipped_teacher_is_not_trained(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "train_teacher", lambda *_: pytest.fail("it was trained"))
    module, card = teacher_from_recipe("digits-convnet")
    assert fingerprint(module) == card.weights_fingerprint and not cache.exists()


def test_all_mistakes_are_listed_with_the_nearest_key(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.yaml",
        sead=3,
        num_classes=1,
        training={"epochs": 0, "batchsize": 3},
        input={"channels": 1, "height": 16},
    )
    with pytest.raises(RecipeError) as caught:
        load_teacher_recipe(path)
    message = str(caught.value)
    for line in (
        "got 5 mistakes",
        "sead: unknown key; did you mean 'seed'?",
        "num_classes: got 1",
        "training.epochs: got 0",
        "training.batchsize: unknown key; did you mean 'batch_size'?",
        "input.width: got",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"channels": 1, "heigth": 8, "width": 8}, "input.heigth: unknown key; did you mean 'heig"),
        ({"kind": "text", "shpe": [8]}, "input.shpe: unknown key; did you mean 'shape'?"),
        ({"kind": "text"}, "input.shape: got"),
        ({"kind": "audio", "shape": [8]}, "sample_rate_hz=0, expected a rate for audio"),
        ("text", "input: got 'text'"),
    ],
)
def test_a_mistake_in_an_input_is_told_where_it_stands(tmp_path: Path, given, expected) -> None:
    with pytest.raises(RecipeError) as caught:
        load_teacher_recipe(write(tmp_path / "bad.yaml", input=given))
    assert expected in str(caught.value)


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'digit-convnet'.*did you mean 'digits-convnet'"):
        load_teacher_recipe("digit-convnet")
    with pytest.raises(RecipeError, match="expected one of"):
        load_teacher_recipe(tmp_path / "missing.yaml")
    for content, expected in (("a: [", "expected YAML"), ("", "without keys"), ("- 1", "keys")):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(RecipeError, match=expected):
            load_teacher_recipe(tmp_path / "bad.yaml")


def test_classes_must_be_those_of_the_data(tmp_path: Path) -> None:
    recipe: TeacherRecipe = load_teacher_recipe(write(tmp_path / "seven.yaml", num_classes=7))
    with pytest.raises(RecipeError, match=r"num_classes=7 .* expected 10"):
        train_teacher(recipe, None)


# Slices


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def three_epochs(quick: Path) -> TeacherRecipe:
    recipe = load_teacher_recipe(quick)
    training = recipe.training.model_copy(update={"epochs": 3})
    return recipe.model_copy(update={"training": training})


def test_slices_and_a_kill_leave_the_same_bytes_as_one_go(
    three_epochs: TeacherRecipe, tmp_path: Path
) -> None:
    train_teacher(three_epochs, tmp_path / "whole")
    out = tmp_path / "sliced"
    with pytest.raises(Interrupted, match="stopped after epoch 1 of 3; --resume goes on"):
        train_teacher(three_epochs, out, minutes=1e-9)
    assert [path.name for path in out.iterdir()] == ["quick.training"]
    child = os.fork()
    if child == 0:

        def kill(epoch: int, loss: float) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        train_teacher(three_epochs, out, resume=True, on_epoch=kill)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    epochs: list[int] = []
    train_teacher(three_epochs, out, resume=True, on_epoch=lambda epoch, loss: epochs.append(epoch))
    assert epochs == [3]
    assert files(out) == files(tmp_path / "whole")


def test_a_finished_teacher_is_not_trained_again(quick: Path, tmp_path: Path) -> None:
    recipe = load_teacher_recipe(quick)
    module, card = train_teacher(recipe, tmp_path)
    epochs: list[int] = []
    again, same = train_teacher(
        recipe, tmp_path, resume=True, on_epoch=lambda epoch, loss: epochs.append(epoch)
    )
    assert (epochs, same) == ([], card)
    assert fingerprint(again) == fingerprint(module)
    other = recipe.model_copy(update={"seed": 1})
    with pytest.raises(CheckpointError, match="made by another recipe"):
        train_teacher(other, tmp_path, resume=True)


def test_the_training_of_another_recipe_is_not_resumed(
    three_epochs: TeacherRecipe, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train_teacher(three_epochs, tmp_path, minutes=1e-9)
    with pytest.raises(CheckpointError, match="was started with another recipe"):
        train_teacher(three_epochs.model_copy(update={"seed": 1}), tmp_path, resume=True)
    # Started anew it finds nothing of the old one.
    epochs: list[int] = []
    train_teacher(three_epochs, tmp_path, on_epoch=lambda epoch, loss: epochs.append(epoch))
    assert epochs == [1, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_a_training_that_goes_on(
    number: signal.Signals, three_epochs: TeacherRecipe, tmp_path: Path
) -> None:
    def stop(epoch: int, loss: float) -> None:
        os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="stopped after epoch 1 of 3"):
        train_teacher(three_epochs, tmp_path, on_epoch=stop)
    with pytest.raises(Interrupted, match="nothing was kept"):
        train_teacher(three_epochs, None, on_epoch=stop)


def test_keys_that_came_later_change_a_digest_only_where_they_are_used() -> None:
    recipe = load_teacher_recipe("digits-convnet")
    for changes in ({"device": "auto"}, {"with_select": True}):
        assert recipe.model_copy(update=changes).sha256() != recipe.sha256()
    flipped = recipe.training.model_copy(update={"flip": True})
    assert recipe.model_copy(update={"training": flipped}).sha256() != recipe.sha256()


def test_the_select_split_is_trained_on_only_if_asked_for(quick: Path) -> None:
    recipe = load_teacher_recipe(quick)
    _, without = train_teacher(recipe, None)
    _, card = train_teacher(recipe.model_copy(update={"with_select": True}), None)
    assert without.train_fingerprint == load_images("digits", "train").fingerprint
    assert card.train_fingerprint != without.train_fingerprint
    assert card.weights_fingerprint != without.weights_fingerprint


def test_settings_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    values = yaml.safe_load((RECIPES_FOLDER / "digits-convnet.yaml").read_text())["training"]
    with pytest.raises(RecipeError, match="momentum and nesterov belong to optimizer: sgd"):
        load_teacher_recipe(write(tmp_path / "x.yaml", training={**values, "nesterov": True}))
