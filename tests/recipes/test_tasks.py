from pathlib import Path

import pytest
import yaml

from vestige.core.types import InputSpec
from vestige.errors import RecipeError
from vestige.recipes.loading import find_problems, load_recipe
from vestige.recipes.tasks import make_task, task_card, task_problems
from vestige.recipes.teacher_schema import RECIPES_FOLDER, load_teacher_recipe
from vestige.tasks.classification import Classification
from vestige.tasks.segmentation import Segmentation

SPEC = InputSpec.image(3, 8, 8)


def test_a_task_gets_its_settings() -> None:
    assert isinstance(make_task("classification", SPEC, 3), Classification)
    plain = make_task("segmentation", SPEC, 3)
    assert isinstance(plain, Segmentation) and plain.ignore_index == 255
    other = make_task("segmentation", SPEC, 3, {"ignore_index": 11})
    assert isinstance(other, Segmentation) and other.ignore_index == 11


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        ("segmentation", {"ignore_indx": 1}, "ignore_indx: no such key; did you mean"),
        ("segmentation", {"ignore_index": "void"}, "ignore_index: got 'void'"),
        ("classification", {"ignore_index": 1}, "task_config.ignore_index: no such key"),
    ],
)
def test_what_a_task_does_not_take_is_told(
    kind: str, config: dict[str, object], expected: str
) -> None:
    with pytest.raises(RecipeError, match=expected):
        make_task(kind, SPEC, 3, config)
    (told,) = task_problems({"task": kind, "task_config": config})
    assert expected in told


def test_it_is_told_with_all_other_mistakes() -> None:
    raw = {
        "method": "dfad",
        "task": "segmentation",
        "task_config": {"ignore_indx": 1, "num_classes": 4},
        "teacher": "builtin:digits-convnet",
        "student": {"name": "convnet", "args": {"width": 3}},
        "config": {"round": 1},
    }
    _, problems = find_problems(raw)
    text = "\n".join(problems)
    for expected in (
        "task_config.ignore_indx: no such key; did you mean 'ignore_index'?",
        "task_config.num_classes: no such key",
        "student.args.width: no such key",
        "config.round: no such key",
    ):
        assert expected in text, text


def test_recipes_without_settings_of_a_task_are_as_they_were() -> None:
    recipe = load_recipe("dfad")
    assert "task_config" not in recipe.to_yaml() and recipe.task_config == {}
    other = recipe.model_copy(update={"task_config": {"ignore_index": 3}})
    assert yaml.safe_load(other.to_yaml())["task_config"] == {"ignore_index": 3}
    assert other.fingerprint() != recipe.fingerprint()
    assert "task_config" not in recipe.arm("dfad").model_dump() if recipe.arms else True


def test_digests_of_earlier_teacher_recipes_are_as_they_were() -> None:
    digests = {
        "cifar10-resnet34": "933a258aa010b8ab",
        "cifar10-wrn-40-2": "22496b10d7190e11",
        "digits-convnet": "3671c8ecfe65d265",
        "fashion-mnist-convnet": "3422dce8780d976d",
        "mnist-convnet": "203ab33ad6248290",
        "mnist-lenet5": "f4bbad176ea63c88",
    }
    assert {name: load_teacher_recipe(name).sha256()[:16] for name in digests} == digests


def test_what_a_teacher_recipe_says_of_its_task_counts(tmp_path: Path) -> None:
    values = yaml.safe_load((RECIPES_FOLDER / "scenes-encoder-decoder.yaml").read_text())
    path = tmp_path / "scenes-encoder-decoder.yaml"
    shipped = load_teacher_recipe("scenes-encoder-decoder").sha256()
    seen = {shipped}
    for change in (
        {"task_config": {"ignore_index": 7}},
        {"task": "classification"},
        {"training": {**values["training"], "focal_gamma": 2}},
    ):
        path.write_text(yaml.safe_dump({**values, **change}))
        seen.add(load_teacher_recipe(path).sha256())
    assert len(seen) == 4
    path.write_text(yaml.safe_dump({**values, "task_config": {}}))
    assert load_teacher_recipe(path).sha256() == shipped


def test_all_mistakes_of_a_teacher_recipe_are_told(tmp_path: Path) -> None:
    values = yaml.safe_load((RECIPES_FOLDER / "scenes-encoder-decoder.yaml").read_text())
    path = tmp_path / "mine.yaml"
    values["training"] |= {"focal_gama": 2, "label_smoothing": 0.1}
    path.write_text(yaml.safe_dump({**values, "task_config": {"ignore": 7}}))
    with pytest.raises(RecipeError) as caught:
        load_teacher_recipe(path)
    told = str(caught.value)
    assert "got 2 mistakes" in told
    assert "focal_gama: unknown key; did you mean 'focal_gamma'?" in told
    assert "task_config.ignore: no such key" in told
    path.write_text(yaml.safe_dump({**values, "training": {"epochs": 1}, "task": "segmentatoin"}))
    with pytest.raises(RecipeError, match=r"task: got 'segmentatoin'.*'segmentation'"):
        load_teacher_recipe(path)
    both = {"epochs": 1, "focal_gamma": 1, "label_smoothing": 0.1}
    path.write_text(yaml.safe_dump({**values, "training": both}))
    with pytest.raises(RecipeError, match="give one of the two"):
        load_teacher_recipe(path)


def test_cards_say_nothing_of_what_is_usual() -> None:
    assert task_card("classification", {}) == {}
    assert task_card("segmentation", {}) == {"task": "segmentation", "task_config": {}}
