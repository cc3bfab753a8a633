"""The nine skeletons run, and a run that is killed and resumed ends bit-identical."""

import json

import pytest
import skeletons as s
import torch
from torch import nn

from vestige.core import seeding
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SHAPES = {
    "a adversarial pair": (s.AdversarialPair, ()),
    "b inversion": (s.Inversion, ()),
    "c four players": (s.FourPlayers, ()),
    "d bilevel plug-in": (s.AdversarialPair, (s.Bilevel,)),
    "e term and gradient, around d": (s.AdversarialPair, (s.TermAndGradient, s.Bilevel)),
    "f embeddings": (s.Embeddings, ()),
    "f embeddings, within d": (s.Embeddings, (s.Bilevel,)),
    "f embeddings, within e around d": (s.Embeddings, (s.TermAndGradientOnly, s.Bilevel)),
    "g bootstrap": (s.Bootstrap, ()),
    "h clients": (s.Federated, ()),
    "i many teachers": (s.ManyTeachers, ()),
}


class Killed(BaseException):
    """Not an Exception, so that nothing on the way may swallow it."""


def start(shape, plugins, out, kill=None):
    """A new process would build everything anew; so does this."""
    with seeding.seeded(7, "nets"):
        teachers = [s.white_box(), s.white_box(), s.black_box(budget=3 * s.BATCH)]
        teachers = teachers if shape is s.ManyTeachers else teachers[:1]
        student = s.make_student()
        method = shape(teachers, student)
        made = {plugin.__name__: plugin(s.Settings()) for plugin in plugins}
    trainer = Trainer(
        method,
        s.FakeTask(),
        teachers=teachers,
        student=student,
        plugins=made,
        evaluate=score,
        out=out,
        seed=3,
        config=TrainerConfig(device="cpu", log_every=1),
        callbacks=[kill] if kill else [],
    )
    return trainer


@torch.no_grad()
def score(net):
    """Leaves the net in eval mode: putting flags back is the trainer's business."""
    return {"accuracy": float(net.eval()(torch.ones(2, s.WIDTH)).mean())}


def everything(trainer):
    """Every tensor that could differ, by name."""
    found = {"rng": trainer.ctx.rng.get_state(), "global": torch.get_rng_state()}
    for name, part in trainer.parts().items():
        for key, value in part.state_dict().items() if hasattr(part, "state_dict") else ():
            if isinstance(value, torch.Tensor):
                found[f"{name}/{key}"] = value.clone()
        for index in range(part.shard_count() if hasattr(part, "shard_count") else 0):
            found.update({f"{name}/{index}/{k}": v for k, v in part.shard(index).items()})
        if isinstance(part, nn.Module):
            found |= {
                f"{name}/{n}/training": torch.tensor(m.training) for n, m in part.named_modules()
            }
    for name, entry in trainer.ctx._optimizers.by_name.items():
        for index, state in entry.optimizer.state_dict()["state"].items():
            found |= {
                f"{name}/{index}/{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)
            }
    return found


def killer(point):
    """A callback that kills at one of the four points."""
    seen = {"rounds": 0, "loops": set(), "steps": 0}

    def kill(event):
        if event.kind == "start" and point == "before a round":
            raise Killed
        if event.kind == "round":
            seen["rounds"] += 1
            seen["loops"].add(event.data["loop"])
            if point == "after a round" and seen["rounds"] == 2:
                raise Killed
            if point == "in the second loop" and len(seen["loops"]) == 2:
                raise Killed
        if event.kind == "step" and point == "inside a round":
            seen["steps"] += 1
            if seen["rounds"] == 1 or seen["steps"] == 2:
                raise Killed

    return kill


@pytest.mark.parametrize(
    "point", ["before a round", "inside a round", "after a round", "in the second loop"]
)
@pytest.mark.parametrize("name", SHAPES)
def test_a_killed_run_resumes_bit_identical(name, point, tmp_path):
    shape, plugins = SHAPES[name]
    whole = start(shape, plugins, tmp_path / "whole")
    whole.run()

    killed = start(shape, plugins, tmp_path / "killed", killer(point))
    with pytest.raises(Killed):
        killed.run()
    resumed = start(shape, plugins, tmp_path / "killed")
    resumed.run(resume=True)

    expected, found = everything(whole), everything(resumed)
    assert found.keys() == expected.keys()
    different = [key for key, value in expected.items() if not torch.equal(value, found[key])]
    assert different == []
    assert resumed.watch.scores == whole.watch.scores
    assert steps(tmp_path / "killed") == steps(tmp_path / "whole")


@pytest.mark.parametrize("name", SHAPES)
def test_the_student_learns_something_and_the_teacher_stays(name, tmp_path):
    shape, plugins = SHAPES[name]
    trainer = start(shape, plugins, None)
    before = {key: value.clone() for key, value in trainer.student.state_dict().items()}
    teacher = {k: v.clone() for k, v in trainer.teachers[0].state_dict().items()}
    trainer.run()
    after = trainer.student.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(
        torch.equal(value, trainer.teachers[0].state_dict()[k]) for k, value in teacher.items()
    )
    assert trainer.ctx.hooks.called == set(trainer.plugins)


def test_the_black_box_stops_at_its_budget():
    trainer = start(s.ManyTeachers, (), None)
    trainer.run()
    assert trainer.teachers[-1].queries == 3 * s.BATCH
    assert len(trainer.method.pool) == 3 * s.BATCH


def test_plugins_change_the_result_and_leave_live_statistics_alone():
    plain, meta = start(s.AdversarialPair, (), None), start(s.AdversarialPair, (s.Bilevel,), None)
    plain.run()
    meta.run()
    updates = plain.ctx.progress.steps
    assert meta.ctx.progress.steps == updates
    assert not torch.equal(plain.student[0].weight, meta.student[0].weight)
    # 12 student updates and 3 source updates run the live student forward once each.
    counts = [t.student[1].num_batches_tracked.item() for t in (plain, meta)]
    assert counts == [15, 15]


def steps(folder):
    """Metrics without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
