"""What a recipe may say, how its layers merge, and that every shipped preset is valid."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file

from vestige.core.types import InputSpec
from vestige.errors import RecipeError, ShapeError
from vestige.models.factory import build_model
from vestige.recipes import catalog
from vestige.recipes.build import build
from vestige.recipes.files import merge, read_yaml
from vestige.recipes.loading import load_recipe, validate
from vestige.recipes.schema import Recipe
from vestige.recipes.updates import student_updates

PRESETS = [
    (name, preset)
    for name in catalog.shipped()
    for preset in (read_yaml(name).get("presets") or {"": {}})
]
GOOD: dict[str, Any] = {
    "method": "kd",
    "teacher": "builtin:digits-convnet",
    "student": {"name": "convnet", "args": {"widths": [4, 4, 4]}},
    "sources": {"inputs": {"kind": "noise"}},
    "config": {"rounds": 1},
}


def mistakes(raw: dict[str, Any]) -> list[str]:
    """One line per mistake, without the bullet."""
    with pytest.raises(RecipeError) as caught:
        validate(raw)
    head, *lines = str(caught.value).splitlines()
    assert (
        head == f"the recipe has {f'{len(lines)} mistakes' if len(lines) > 1 else 'one mistake'}:"
    )
    return [line.removeprefix("  - ") for line in lines]


# Shipped recipes


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_every_preset_is_valid_and_resolves_to_itself(name: str, preset: str, tmp_path: Path):
    recipe = load_recipe(name, preset=preset or None)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), encoding="utf8")
    again = load_recipe(tmp_path / "again.yaml")
    assert again.fingerprint() == recipe.fingerprint()
    assert again.method_config() == recipe.method_config()


@pytest.mark.parametrize("name", catalog.shipped())
def test_the_header_says_what_it_is_what_it_needs_and_how_to_start_it(name: str):
    text = catalog.shipped()[name].read_text(encoding="utf8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# ") and header[0].endswith(".")
    assert any("Needs" in line for line in header)
    command = "vestige demo" if name == "demo" else f"vestige run {name}"
    assert any(command in line for line in header)


def test_one_row_is_refused_where_it_is_asked_for():
    found = mistakes({**GOOD, "config": {"batch_size": 1}})
    assert found == ["config.batch_size: got 1; Input should be greater than or equal to 2"]


# Merging


def test_a_preset_drops_a_key_and_null_is_not_dropping(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                **GOOD,
                "data": "digits",
                "presets": {"a": {"data": None, "student": {"args": "!drop"}}},
            }
        )
    )
    assert load_recipe(path, preset="a").student.args == {}
    assert load_recipe(path, preset="a").data is None
    assert load_recipe(path).data == "digits"


def test_anchors_and_merge_keys_reach_the_method():
    gpu, paper = load_recipe("dfad", preset="gpu"), load_recipe("dfad", preset="paper")
    assert (gpu.method_config().rounds, paper.method_config().rounds) == (250, 500)
    differing = {key for key, value in paper.model_dump().items() if value != gpu.model_dump()[key]}
    assert differing == {"config"}
    # The anchor of the shared arms is one mapping, and each arm still has its own copy to override.
    demo = load_recipe("demo", overrides=["arms.noise.config.loss=kl"])
    assert [demo.arms[a].config["loss"] for a in ("noise", "untrained-generator", "real")] == [
        "kl",
        "l1",
        "l1",
    ]


def test_the_paper_preset_is_the_published_method():
    cfg = load_recipe("dfad", preset="paper").method_config()
    published = type(cfg)()
    assert cfg == published
    assert (cfg.bn_weight, cfg.balance_weight, cfg.replay, cfg.student_mode) == (0, 0, 0, "train")


def test_cpu_is_the_preset_where_none_is_named():
    assert load_recipe("dfad").fingerprint() == load_recipe("dfad", preset="cpu").fingerprint()
    with pytest.raises(RecipeError, match=r"got preset 'smok', expected one of cpu, .*'smoke'"):
        load_recipe("dfad", preset="smok")


def test_the_seed_and_plug_ins_are_put_on_top():
    assert load_recipe("kd", seed=5, overrides=["seed=3"]).seed == 5
    with pytest.raises(RecipeError, match=r"plugins\.0\.name: got plugin 'abdd'"):
        load_recipe("kd", plugins=["abdd"])
    with pytest.raises(RecipeError, match=r"plugins\.1\.name: 'x' is named twice"):
        load_recipe("kd", plugins=["x", "x"])


# Overrides


def test_later_overrides_win_over_earlier_ones_and_over_the_preset():
    recipe = load_recipe(
        "dfad",
        preset="smoke",
        overrides=["config.rounds=7", "config.student_lr=1e-3", "config.rounds=9"],
    )
    assert recipe.method_config().rounds == 9
    assert recipe.method_config().student_lr == 1e-3
    assert recipe.method_config().iterations == 2  # the preset's


# Mistakes


def test_unknown_keys_anywhere_are_all_told_at_once_with_the_nearest():
    raw = merge(
        GOOD,
        {
            "methd": "kd",
            "teacher": {"modle": "convnet", "model": "convnet", "args": {"width": [1]}},
            "student": {"nam": "x", "args": {"wdths": [1]}},
            "sources": {"inputs": {"knd": "noise", "generator": "upsampl"}},
            "config": {"rouns": 1},
            "shared": {"batchsize": 2},
            "trainer": {"devise": "cpu"},
            "input": {"chanels": 1, "channels": 1, "height": 1, "width": 1},
            "arms": {"one": {"title": "x", "confg": {}, "config": {"los": "l1"}}},
        },
    )
    found = mistakes(raw)
    for key, nearest in {
        "methd": "method",
        "teacher.modle": "model",
        "teacher.args.width": "widths",
        "student.nam": "name",
        "student.args.wdths": "widths",
        "sources.inputs.knd": "kind",
        "config.rouns": "rounds",
        "shared.batchsize": "batch_size",
        "trainer.devise": "device",
        "input.chanels": "channels",
        "arms.one.confg": "config",
        "arms.one.config.los": "loss",
    }.items():
        assert f"{key}: no such key; did you mean {nearest!r}?" in found
    assert "sources.inputs.generator: got 'upsampl'; did you mean 'upsample'?" in found
    assert len(found) == len(set(found)) == 13


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"method": "dfadd"}, "method: got method 'dfadd'"),
        ({"method": None}, "method: got None"),
        ({"teacher": "builtin:digits-convet"}, "did you mean 'builtin:digits-convnet'"),
        ({"teacher": "digits-convnet"}, "teacher: got 'digits-convnet', expected 'recipe:NAME'"),
        ({"teacher": "recipe:mnist-convet"}, "did you mean 'mnist-convnet'"),
        (
            {"teacher": {}},
            "teacher: give exactly one of 'factory', 'model', 'timm', 'smp', 'hf', 'ensemble'",
        ),
        ({"teacher": 5}, "teacher.str: got 5"),
        ({"student": {"name": "convnett"}}, "did you mean 'convnet'"),
        ({"student": {"name": None}}, "student: give exactly one of 'name' and 'factory'"),
        ({"sources": "!drop"}, "sources: 'kd' needs the source 'inputs'"),
        ({"sources": {"input": {"kind": "noise"}}}, "sources.input: 'kd' takes inputs; did you"),
        ({"sources": {"inputs": {"kind": "images"}}}, "sources.inputs.data: images need the name"),
        (
            {"data_shift": ["blurr"], "data": "digits"},
            "data_shift: got 'blurr'; did you mean 'blur'",
        ),
        ({"data_shift": ["blur"]}, "data_shift: there is no data to judge on"),
        (
            {"data_shift": ["blur"], "data": "x", "task": "segmentation"},
            "data_shift: got image inputs and the task 'segmentation', expected images with one",
        ),
        ({"headline": "x"}, "headline: got 'x', expected one of the arms none"),
        ({"plugins": 5}, "plugins: got 5"),
        ({"plugins": [5, {"name": "abd"}]}, "plugins.0: got 5"),
        ({"config": [1]}, "config: got [1]"),
        ({"config": {"loss": "l2"}}, "config.loss: got 'l2'"),
        ({"task": "segmentaton"}, "task: got 'segmentaton'; did you mean 'segmentation'?"),
        ({"num_classes": 1}, "num_classes: got 1"),
        ({"seed": -1}, "seed: got -1"),
        ({"arms": {"a": 5}}, "arms.a: got 5"),
        ({"arms": {"a": {"title": "t", "method": "dfadd"}}}, "arms.a.method: got method 'dfadd'"),
        (
            {"arms": {"a": {"title": "t", "plugins": [{"name": "abdd"}]}}},
            "arms.a.plugins.0.name: got plugin 'abdd'",
        ),
    ],
)
def test_a_mistake_is_named_by_its_key(change: dict[str, Any], expected: str):
    assert any(expected in line for line in mistakes(merge(GOOD, change)))


def test_keys_that_are_no_text_are_mistakes_too():
    assert mistakes({**GOOD, 1: 2})
    assert mistakes({**GOOD, "config": {1: 2}})
    assert mistakes({**GOOD, "student": {"name": "convnet", "args": {None: 2}}})


def test_an_unknown_method_does_not_hide_the_other_mistakes():
    found = mistakes({**GOOD, "method": "kdd", "headline": "x"})
    assert [line.partition(":")[0] for line in found] == ["method", "headline"]


# Arms


def with_arms(**changes: Any) -> dict[str, Any]:
    arms = {name: {"title": name} for name in ("first", "second", "third")}
    return merge({**GOOD, "arms": arms}, changes)


def test_a_mistake_of_the_main_config_is_told_once_and_not_for_each_arm():
    assert mistakes(with_arms(config={"rouns": 1, "loss": "l2"})) == [
        "config.loss: got 'l2'; Input should be 'kl' or 'l1'",
        "config.rouns: no such key; did you mean 'rounds'?",
    ]


def test_a_mistake_of_an_arm_is_told_under_its_name_alone():
    found = mistakes(with_arms(arms={"second": {"config": {"rouns": 1, "rounds": 0}}}))
    assert found == [
        "arms.second.config.rounds: got 0; Input should be greater than or equal to 1",
        "arms.second.config.rouns: no such key; did you mean 'rounds'?",
    ]


def test_an_arm_that_mends_the_main_config_does_not_hide_its_mistake():
    found = mistakes(with_arms(config={"loss": "l2"}, arms={"first": {"config": {"loss": "l1"}}}))
    assert found == ["config.loss: got 'l2'; Input should be 'kl' or 'l1'"]


def test_the_same_mistake_in_main_config_and_arm_is_two_mistakes():
    found = mistakes(with_arms(config={"rouns": 1}, arms={"first": {"config": {"rouns": 1}}}))
    assert [line.partition(":")[0] for line in found] == ["config.rouns", "arms.first.config.rouns"]


def test_a_shared_key_that_another_methods_arms_do_not_know_is_told_once():
    dfad = {"method": "dfad"}
    found = mistakes(with_arms(shared={"loss": "l1"}, arms={"first": dfad, "third": dfad}))
    assert [line.partition(";")[0] for line in found] == ["shared.loss: no such key"]


def test_an_arm_of_an_unknown_method_is_told_once_where_it_stands():
    found = mistakes(with_arms(method="kdd"))
    assert [line.partition(":")[0] for line in found] == ["method"]
    found = mistakes(with_arms(arms={"third": {"method": "kdd"}}))
    assert [line.partition(":")[0] for line in found] == ["arms.third.method"]


def test_an_arm_keeps_everything_but_what_it_names():
    recipe = load_recipe("demo", seed=4, overrides=["trainer.log_every=3"])
    for name in recipe.arms:
        arm = recipe.arm(name)
        assert (arm.seed, arm.student, arm.teacher) == (4, recipe.student, recipe.teacher)
        assert (arm.data, arm.shared, arm.trainer) == (recipe.data, recipe.shared, recipe.trainer)
        assert (arm.arms, arm.headline, arm.baseline, arm.reference) == ({}, None, None, None)
        again = validate(yaml.safe_load(arm.to_yaml()))
        assert again.fingerprint() == arm.fingerprint()
    published, mended = (recipe.arm(name).method_config() for name in ("dfad", "dfad-bn"))
    assert published == mended.model_copy(update={"bn_weight": 0.0})


def test_an_arm_of_another_method_takes_over_shared_settings_only():
    recipe = load_recipe("demo")
    noise = recipe.arm("noise").method_config()
    main = recipe.method_config()
    for key in recipe.shared:
        assert getattr(noise, key) == getattr(main, key)
    assert set(recipe.arm("noise").sources) == {"inputs"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("demo", 1500),
        ("all-methods", 1500),
        ("cmi-contrast", 2000),
        ("fast-meta", 2000),
        ("deepinversion-terms", 2000),
        ("dfad-remedies", 1500),
        ("dfq-terms", 3000),
        ("retain-dfad", 1500),
        ("zskt-z", 3000),
    ],
)
def test_arms_have_the_same_number_of_student_steps(name, expected):
    for preset, wanted in ((None, expected), ("smoke", None)):
        recipe = load_recipe(name, preset=preset)
        steps = set()
        for arm in recipe.arms:
            one = recipe.arm(arm)
            steps.add(student_updates(one.method, one.method_config().model_dump()))
        assert len(steps) == 1
        assert wanted is None or steps == {wanted}


# Building


def test_a_teacher_without_a_card_needs_input_and_classes(tmp_path: Path):
    weights = tmp_path / "weights.safetensors"
    save_file(build_model("lenet5", InputSpec.image(3, 32, 32), 10).state_dict(), weights)
    recipe = load_recipe(
        "kd",
        overrides=[
            f"teacher={{model: lenet5, weights: {weights}}}",
            "data=null",
        ],
    )
    with pytest.raises(RecipeError, match="input and num_classes: a teacher without a card"):
        build(recipe)


def test_what_contradicts_the_teachers_card_is_refused():
    with pytest.raises(RecipeError, match=r"num_classes: got 7, expected 10"):
        build(load_recipe("kd", overrides=["num_classes=7"]))
    with pytest.raises(RecipeError, match="input: got"):
        build(load_recipe("kd", overrides=["input={channels: 1, height: 8, width: 8}"]))


def test_a_student_that_cannot_take_the_input_is_refused_before_the_run():
    with pytest.raises((RecipeError, ShapeError)):
        build(load_recipe("kd", overrides=["student={name: vgg11}", "student.args=!!null"]))


def test_a_factory_that_makes_no_network_is_named():
    with pytest.raises(RecipeError, match=r"student.factory: 'collections:OrderedDict' made a"):
        build(
            load_recipe(
                "kd",
                overrides=[
                    "student={factory: 'collections:OrderedDict', name: null, args: {}}",
                    "student.args='!drop'",
                ],
            )
        )


def test_a_factory_whose_layers_have_no_sizes_yet_is_named():
    with pytest.raises(
        RecipeError, match=r"made a LazyLinear whose layers .* shape \(1, 1, 16, 16"
    ):
        build(
            load_recipe(
                "kd",
                overrides=[
                    "student={factory: 'torch.nn:LazyLinear', name: null}",
                    "student.args={out_features: 10, widths: '!drop'}",
                ],
            )
        )


def test_a_recipe_survives_its_own_file_whatever_characters_it_holds() -> None:
    odd = Recipe(method="kd", teacher="a\x85b\u2028c", student={"name": "convnet"})
    assert yaml.safe_load(odd.to_yaml())["teacher"] == odd.teacher
    plain = Recipe(method="kd", teacher="é", student={"name": "convnet"})
    assert "é" in plain.to_yaml()
