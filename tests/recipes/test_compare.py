"""Several methods side by side: what they share, what is their own, what is refused."""

import base64
import html
import json
import sys
import types
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
import yaml
from pydantic import BaseModel

from vestige.core.types import Requires
from vestige.errors import RecipeError
from vestige.methods.dfad import DFAD
from vestige.recipes.arms import run_arms
from vestige.recipes.build import build
from vestige.recipes.catalog import METHODS
from vestige.recipes.compare import BUDGET, compare
from vestige.recipes.loading import load_recipe, validate
from vestige.recipes.updates import student_updates


def updates(recipe: Any, arm: str) -> float | None:
    run = recipe.arm(arm)
    return student_updates(run.method, run.method_config().model_dump())


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch):
    """Offers a class as a method under a name, as a file in `methods` would."""
    real = METHODS._modules()

    def add(name: str, offered: type) -> None:
        module = types.ModuleType(f"offered_{name}")
        offered.__module__ = module.__name__
        setattr(module, offered.__name__, offered)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        real[name] = module.__name__
        monkeypatch.setattr(METHODS, "_modules", lambda: dict(real))

    return add


class PickyConfig(BaseModel, extra="forbid"):
    rounds: int = 7
    student_lr: float = 1.0
    taste: str = "bitter"


def picky(**requires: Any) -> type:
    """A method that the library has never heard of."""
    members = {
        "Config": PickyConfig,
        "requires": Requires(**requires),
        "__init__": lambda self, *given: None,
        "run": lambda self, ctx: iter(()),
        "parts": lambda self: {},
        "result": lambda self: None,
        "passes": lambda self, cfg: {"student_step": 3.0},
    }
    return type("Picky", (), members)


def test_every_method_gets_the_recipes_budget_and_keeps_what_is_its_own():
    found = compare(["dfad", "kd"], "dfad", preset="cpu")
    recipe = found.recipe
    assert list(recipe.arms) == ["dfad", "kd"]
    main, other = recipe.arm("dfad").method_config(), recipe.arm("kd").method_config()
    assert main == load_recipe("dfad", preset="cpu").method_config()
    for key in BUDGET:
        assert getattr(main, key) == getattr(other, key), key
    assert updates(recipe, "dfad") == updates(recipe, "kd") == 12 * 25 * 5
    own = load_recipe("kd", preset="cpu")
    assert other.loss == own.method_config().loss == "l1"
    assert recipe.arm("kd").sources == own.sources
    assert recipe.arm("kd").student == recipe.student
    assert recipe.arm("kd").seed == recipe.seed
    assert "Each makes 1,500 updates of the student." in found.note
    assert "as in the recipe 'kd'" in recipe.arms["kd"].title
    # Nothing names them, so there is no gap to close.
    assert recipe.baseline is recipe.reference is None


def test_the_recipes_own_arm_of_a_method_comes_before_the_shipped_recipe():
    recipe = compare(["kd", "dfad"], "demo").recipe
    assert list(recipe.arms) == ["kd", "dfad", "real"]
    assert recipe.arm("kd").sources == load_recipe("demo").arm("noise").sources
    # The arm that is the baseline is one of the methods, and the reference comes along.
    assert (recipe.baseline, recipe.reference, recipe.headline) == ("kd", "real", "dfad")
    demo = load_recipe("demo")
    assert recipe.arm("real").method_config() == demo.arm("real").method_config()
    assert recipe.arm("dfad").method_config() == demo.method_config()


def test_the_headline_is_the_recipes_method_or_the_first_named(offer: Any):
    offer("picky", picky())
    assert compare(["picky", "kd"], "dfad").recipe.headline == "picky"
    assert compare(["picky", "dfad"], "dfad").recipe.headline == "dfad"


def test_a_method_without_a_recipe_keeps_its_defaults_and_its_updates_are_evened_out(offer: Any):
    offer("picky", picky())
    found = compare(["dfad", "picky"], "dfad")
    cfg = found.recipe.arm("picky").method_config()
    assert cfg.taste == "bitter"
    assert cfg.student_lr == 4e-3
    # Three updates a round and no iterations to turn, so the rounds are.
    assert cfg.rounds == 500
    assert "with its defaults" in found.recipe.arms["picky"].title


def test_a_method_that_gathers_images_keeps_its_rounds_and_its_steps_are_evened_out(
    offer: Any, tmp_path: Path
):
    gatherer = picky()
    gatherer.Config = pydantic.create_model(
        "Gatherer", rounds=(int, 20), warmup=(int, 4), student_steps=(int, 100)
    )
    gatherer.passes = lambda self, cfg: {"student_step": float(cfg.student_steps)}
    offer("gatherer", gatherer)
    raw = load_recipe("dfad", preset="cpu").model_dump(mode="json")
    raw["arms"] = {
        "pool": {
            "method": "gatherer",
            "title": "t",
            "config": {"rounds": 30, "warmup": 6, "student_steps": 7},
        }
    }
    raw["headline"] = "pool"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    recipe = compare(["dfad", "gatherer"], tmp_path / "r.yaml").recipe
    cfg = recipe.arm("gatherer").method_config()
    assert (cfg.rounds, cfg.student_steps, cfg.warmup) == (30, 50, 6)
    assert updates(recipe, "gatherer") == updates(recipe, "dfad") == 1500
    # Its defaults are no settings of its own: then the rounds are those of the recipe.
    recipe = compare(["dfad", "gatherer"], "dfad", preset="cpu").recipe
    cfg = recipe.arm("gatherer").method_config()
    assert (cfg.rounds, cfg.student_steps) == (12, 125)


def test_all_start_from_the_same_student_and_teacher():
    recipe = compare(["dfad", "kd"], "dfad", preset="smoke", seed=3).recipe
    jobs = [build(recipe.arm(name)) for name in recipe.arms]
    first, second = (job.student.state_dict() for job in jobs)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert len({job.facts.teacher_fingerprint for job in jobs}) == 1
    other = build(compare(["dfad", "kd"], "dfad", preset="smoke", seed=4).recipe.arm("kd")).student
    assert not all(torch.equal(first[key], other.state_dict()[key]) for key in first)


def test_a_setting_that_asks_for_batchnorm_is_told_before_anything_runs(offer: Any, tmp_path: Path):
    raw = load_recipe("kd", preset="smoke").model_dump(mode="json")
    raw |= {
        "teacher": {"model": "lenet5"},
        "input": {"channels": 1, "height": 16, "width": 16},
        "num_classes": 10,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(RecipeError) as caught:
        compare(["kd", "dfad"], tmp_path / "r.yaml", overrides=["arms.dfad.config.bn_weight=2"])
    assert "arm 'dfad': 'dfad' with bn_weight: 2 needs BatchNorm statistics" in str(caught.value)
    assert "set bn_weight: 0, or take another method (" in str(caught.value)
    off = ["arms.dfad.config.bn_weight=0"]
    assert compare(["kd", "dfad"], tmp_path / "r.yaml", overrides=off).recipe.arms


def test_updates_that_cannot_be_evened_out_are_told(offer: Any):
    silent = picky()
    silent.passes = lambda self, cfg: {}
    offer("picky", silent)
    note = compare(["dfad", "picky"], "dfad").note
    assert "dfad 1,500; picky not told by its settings" in note


def test_overrides_reach_every_method_or_one_alone():
    recipe = compare(
        ["dfad", "kd"],
        "dfad",
        overrides=[
            "trainer.minutes=2",
            "config.rounds=3",
            "config.generator_lr=0.5",
            "arms.kd.config.temperature=9",
        ],
        seed=4,
    ).recipe
    for name in ("dfad", "kd"):
        arm = recipe.arm(name)
        assert (arm.trainer.minutes, arm.seed, arm.method_config().rounds) == (2, 4, 3)
    assert recipe.arm("kd").method_config().temperature == 9
    assert recipe.arm("dfad").method_config().generator_lr == 0.5
    assert updates(recipe, "kd") == updates(recipe, "dfad") == 3 * 25 * 5


def test_the_other_methods_preset_follows_where_it_has_one():
    recipe = compare(["dfad", "kd"], "dfad", preset="gpu").recipe
    assert recipe.arm("kd").sources["inputs"].data == "cifar10"
    assert recipe.arm("kd").method_config().loss == "kl"
    # kd's recipe has no preset of that name.
    recipe = compare(["dfad", "kd"], "dfad", preset="mnist").recipe
    assert recipe.arm("kd").sources["inputs"].kind == "noise"


def test_everything_that_keeps_a_method_from_running_is_told_at_once(offer: Any, tmp_path: Path):
    offer("picky", picky(sources=("meadow",), tasks=("segmentation",)))
    offer("statistician", picky(batchnorm=True))
    raw = load_recipe("kd", preset="smoke").model_dump(mode="json")
    raw |= {
        "teacher": {"model": "lenet5"},
        "input": {"channels": 1, "height": 16, "width": 16},
        "num_classes": 10,
        "access": "scores",
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(RecipeError) as caught:
        compare(["kd", "picky", "statistician", "dfad"], tmp_path / "r.yaml")
    told = str(caught.value)
    for expected in (
        "arms.picky.sources: 'picky' needs the source 'meadow'",
        "arms.picky.task: 'picky' serves segmentation",
        "arms.dfad.access: 'dfad' needs white_box, got scores",
        "arm 'statistician': 'statistician' needs BatchNorm statistics, but the teacher has 0",
    ):
        assert expected in told
    assert "arms.kd" not in told


@pytest.mark.parametrize("names", [["kd"], ["kd", "kd"], ["kd", ""], []])
def test_less_than_two_methods_are_no_comparison(names: list[str]):
    with pytest.raises(RecipeError, match="expected two methods or more, each once"):
        compare(names, "kd")


def test_an_unknown_method_is_named_with_the_nearest():
    with pytest.raises(RecipeError, match=r"got method 'dfda', .* did you mean 'dfad'\?"):
        compare(["kd", "dfda"], "kd")


def test_what_the_method_suggests_for_the_recipe_is_what_all_are_given(tmp_path: Path):
    raw = load_recipe("dfad", preset="smoke").model_dump(mode="json")
    raw |= {"defaults": "suggested", "config": {"rounds": 2}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    recipe = compare(["dfad", "kd"], tmp_path / "r.yaml").recipe
    main, other = recipe.arm("dfad").method_config(), recipe.arm("kd").method_config()
    published = DFAD.Config()
    assert main.batch_size == other.batch_size != published.batch_size
    assert main.student_lr == other.student_lr != published.student_lr
    assert updates(recipe, "dfad") == updates(recipe, "kd")


def test_a_comparison_runs_resumes_and_says_what_is_common(tmp_path: Path):
    found = compare(
        ["dfad", "kd"], "demo", preset="smoke", overrides=["trainer.device=cpu"], plugins=()
    )
    out = tmp_path / "run"
    summary = run_arms(found.recipe, out, note=found.note)
    assert {path.name for path in (out / "arms").iterdir()} == {"dfad", "kd", "real"}
    assert summary["note"] == found.note
    assert found.note in (out / "report.html").read_text(encoding="utf8")
    rows = {row["name"]: row for row in summary["arm_details"]}
    written = json.loads((out / "comparison.json").read_text(encoding="utf8"))
    assert written["note"] == found.note
    assert [row["method"] for row in written["rows"]] == ["dfad", "kd", "kd"]
    for row in written["rows"]:
        assert {**row, "method": None, "samples": None} == {
            **rows[row["name"]],
            "method": None,
            "samples": None,
        }
        assert (out / row["samples"]).is_file()
    back = {name: row["teacher_passes"]["backward"] for name, row in rows.items()}
    assert back["dfad"] > back["kd"] == back["real"] == 0
    made = {name: row["images_made"] for name, row in rows.items()}
    assert made["dfad"] == made["kd"] > made["real"] == 0
    # Every arm's sheet is on the page, under its name.
    page = html.unescape((out / "report.html").read_text(encoding="utf8"))
    for row in written["rows"]:
        sheet = base64.b64encode((out / row["samples"]).read_bytes()).decode()
        assert sheet in page and f"<figcaption>{row['title']}</figcaption>" in page
    assert rows["kd"]["gap_closed"] in (0.0, None)
    assert rows["dfad"]["headline"]
    # What was run is a recipe of its own, from which the same comparison starts again.
    again = validate(yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf8")))
    assert again.arms == found.recipe.arms
    (out / "arms/kd/summary.json").unlink()
    resumed = run_arms(found.recipe, out, resume=True, note=found.note)
    assert resumed["arms"] == summary["arms"]
    assert json.loads((out / "summary.json").read_text())["note"] == found.note
