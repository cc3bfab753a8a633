"""Suggested < shared < given; and published presets stay as they were."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vestige.methods.dfad import DFADConfig
from vestige.methods.kd import KDConfig
from vestige.recipes.catalog import shipped
from vestige.recipes.loading import load_recipe, validate
from vestige.recipes.run import check_same, run_recipe
from vestige.recipes.schema import Recipe

TINY = {"rounds": 2, "iterations": 1, "student_steps": 1, "batch_size": 4, "generator_width": 4}


def recipe(**given) -> Recipe:
    return validate(
        {
            "method": "dfad",
            "teacher": "builtin:digits-convnet",
            "student": {"name": "convnet", "args": {"widths": [4, 8]}},
            "trainer": {"device": "cpu"},
            **given,
        }
    )


def config_in(folder: Path) -> dict:
    return yaml.safe_load((folder / "recipe.yaml").read_text())["config"]


def test_what_is_given_wins_over_what_is_shared_over_what_is_suggested(tmp_path):
    run_recipe(
        recipe(shared={"bn_weight": 0.5, "batch_size": 6}, config=TINY), tmp_path, report=False
    )
    used = config_in(tmp_path)
    assert set(used) == set(DFADConfig.model_fields), "every setting is written out"
    assert (used["batch_size"], used["bn_weight"]) == (4, 0.5)
    assert (used["units"], used["student_optimizer"]) == ("relative", "adam")


def test_a_recipe_without_settings_is_resumed_as_it_was_begun(tmp_path):
    run_recipe(recipe(config=TINY), tmp_path, report=False)
    run_recipe(recipe(config=TINY), tmp_path, resume=True, report=False)
    check_same(recipe(config={**TINY, "student_lr": config_in(tmp_path)["student_lr"]}), tmp_path)
    with pytest.raises(ValueError, match=r"config\.student_lr"):
        check_same(recipe(config={**TINY, "student_lr": 0.123}), tmp_path)
    with pytest.raises(ValueError, match="defaults"):
        check_same(recipe(config=TINY, defaults="published"), tmp_path)


def test_the_recipe_that_a_run_leaves_says_the_same_again(tmp_path):
    run_recipe(recipe(config=TINY), tmp_path / "a", report=False)
    run_recipe(load_recipe(tmp_path / "a/recipe.yaml"), tmp_path / "b", report=False)
    assert config_in(tmp_path / "a") == config_in(tmp_path / "b")


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_not_touched_by_suggestions(name):
    presets = yaml.safe_load(shipped()[name].read_text()).get("presets") or {}
    for preset in [None, *presets]:
        assert load_recipe(name, preset=preset).defaults == "published"


def test_the_paper_presets_are_the_papers():
    # Written down before suggestions existed; DFAD's are the reference code's for CIFAR-10.
    dfad = {
        **{"rounds": 500, "iterations": 50, "student_steps": 5, "batch_size": 256},
        **{"student_optimizer": "sgd", "student_lr": 0.1, "student_weight_decay": 5e-4},
        **{"generator_lr": 1e-3, "schedule": "multistep", "milestones": [0.2, 0.4]},
        **{"generator": "upsample", "generator_width": 64, "latent_dim": 256, "log_form": None},
        **{"student_mode": "train", "bn_weight": 0.0, "balance_weight": 0.0, "replay": 0.0},
        **{"replay_size": 4096, "generator_head": "tanh_bn", "units": "absolute"},
        **{"one_hot_weight": 0.0, "recolour": 0.0, "turn": 0.0},
    }
    resolved = load_recipe("dfad", preset="paper").method_config()
    assert resolved.model_dump(mode="json") == dfad
    assert resolved == DFADConfig()
    kd = {
        **{"rounds": 200, "iterations": 312, "batch_size": 128, "student_optimizer": "sgd"},
        **{"student_lr": 0.1, "student_weight_decay": 5e-4, "schedule": "multistep"},
        **{"milestones": [0.6, 0.75, 0.9], "loss": "kl", "temperature": 1.0},
    }
    resolved = load_recipe("kd", preset="paper").method_config()
    assert resolved == KDConfig(**kd)


def test_what_is_shown_is_what_is_known_before_the_networks_are():
    assert recipe(shared={"batch_size": 8}, config={"rounds": 3}).known_config() == {
        "batch_size": 8,
        "rounds": 3,
    }
    published = recipe(config={"rounds": 3}, defaults="published").known_config()
    assert published == DFADConfig(rounds=3).model_dump(mode="json")


def test_a_recipe_without_config_runs_from_the_command_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "method": "dfad",
                "data": "digits",
                "teacher": "builtin:digits-convnet",
                "student": {"name": "convnet", "args": {"widths": [4, 8]}},
                "trainer": {"device": "cpu", "max_steps": 6},
            }
        )
    )
    command = [sys.executable, "-m", "vestige", "run", str(path), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert config_in(tmp_path / "run")["bn_weight"] > 0
