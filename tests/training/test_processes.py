"""Two processes come to what one comes to with the same batches, and come to an end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import skeletons as s
import torch
from torch import nn

from vestige.core import parallel, seeding
from vestige.core.types import Batch, InputSpec, Loss, predict
from vestige.losses.distill import l1_logits
from vestige.losses.prior import class_balance_loss
from vestige.methods.dfad import DFAD, DFADConfig
from vestige.methods.kd import KD, KDConfig
from vestige.methods.kd3 import KD3, KD3Config
from vestige.sources.images import TensorSource
from vestige.sources.noise import NoiseSource
from vestige.tasks.classification import Classification
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.tracking.metrics import read_metrics
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.image(1, 8, 8)
# In float64, where rounding of a dozen steps stays below 1e-9 and any wrong count, mean or order of
# rows is far above it.
CLOSE = {"rtol": 1e-7, "atol": 1e-9}
STEPS = 6


def network(width, *, norm, dropout=0.0):
    layers = [
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(4 * width, 3),
    ]
    return nn.Sequential(*layers)


def teacher():
    made = network(8, norm=True)
    made[1].running_mean.normal_(0, 0.3)
    made[1].running_var.uniform_(0.5, 1.5)
    return made


class DropAndWeight:
    """Drops the rows with a high mean and halves the weight of others."""

    Config, requires = s.Settings, s.Requires()

    def __init__(self, cfg):
        self.calls = 0

    def setup(self, task, teachers, student, ctx):
        pass

    def parts(self):
        return {}

    def student_batch(self, batch):
        means = batch.inputs.flatten(1).mean(1)
        kept = batch.rows(means < means.max())
        return kept.weighted(1 - 0.5 * (kept.inputs.flatten(1).mean(1) > 0))


def kd(out=None, *, rows=8, norm=False, dropout=0.0, plugins=(), rounds=3, **given):
    with seeding.seeded(5, "nets"):
        teachers = [WhiteBoxTeacher(teacher())]
        student = network(4, norm=norm, dropout=dropout)
    cfg = KDConfig(rounds=rounds, iterations=STEPS // 3, batch_size=rows, student_lr=0.05)
    task, sources = Classification(SPEC, 3), {"inputs": NoiseSource(SPEC)}
    method = KD(cfg, task, teachers, student, sources)
    return trainer(method, task, teachers, student, sources, out, plugins, **given)


def dfad(out=None, *, rows=8, plugins=(), **settings):
    with seeding.seeded(5, "nets"):
        teachers, student = [WhiteBoxTeacher(teacher())], network(4, norm=True)
        cfg = DFADConfig(
            rounds=2,
            iterations=2,
            student_steps=2,
            batch_size=rows,
            student_lr=0.05,
            generator_width=4,
            latent_dim=6,
            bn_weight=1.0,
            balance_weight=0.5,
            **settings,
        )
        task = Classification(SPEC, 3)
        method = DFAD(cfg, task, teachers, student, {})
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in method.generator.modules())
    return trainer(method, task, teachers, student, {}, out, plugins)


def trainer(method, task, teachers, student, sources, out, plugins, settings=None, **given):
    return Trainer(
        method,
        task,
        teachers=teachers,
        student=student,
        sources=sources,
        plugins={plugin.__name__: plugin(s.Settings()) for plugin in plugins},
        out=out,
        seed=2,
        config=TrainerConfig(**{"device": "cpu", "log_every": 1, **(settings or {})}),
        **given,
    )


def skeleton(shape, *plugins):
    def build(out=None):
        with seeding.seeded(7, "nets"):
            teachers = [s.white_box(), s.white_box(), s.black_box(budget=3 * s.BATCH)]
            teachers = teachers if shape is s.ManyTeachers else teachers[:1]
            student = s.make_student()
            method = shape(teachers, student)
        for layer in student.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        return trainer(method, s.FakeTask(), teachers, student, {}, out, plugins)

    return build


def kd3(out=None, *, rows=8, **settings):
    with seeding.seeded(5, "nets"):
        teachers, student = [WhiteBoxTeacher(teacher())], network(4, norm=True)
        cfg = KD3Config(
            rounds=2,
            iterations=2,
            batch_size=rows,
            student_lr=0.05,
            head_dim=4,
            warm_rows=2,
            crop_padding=1,
            **settings,
        )
        images = torch.randn(30, *SPEC.shape) * torch.linspace(0.2, 3, 30)[:, None, None, None]
        sources = {"foreign": TensorSource(images, origin="foreign", name="heap")}
        task = Classification(SPEC, 3)
        method = KD3(cfg, task, teachers, student, sources)
    return trainer(method, task, teachers, student, sources, out, ())


EQUAL = {
    "kd": kd,
    "kd3": kd3,
    "kd3, of epochs, odd batch": lambda out=None: kd3(
        out, rows=7, selection="epoch", split_bn=True, false_negatives=0.8
    ),
    "kd, odd batch": lambda out=None: kd(out, rows=7, norm=True),
    "kd, rows dropped and weighted": lambda out=None: kd(out, norm=True, plugins=(DropAndWeight,)),
    "dfad": dfad,
    "dfad, log form and replay": lambda out=None: dfad(out, log_form=True, replay=0.5),
    "dfad, odd batch": lambda out=None: dfad(out, rows=5, student_mode="eval"),
    "a adversarial pair": skeleton(s.AdversarialPair),
    "b inversion": skeleton(s.Inversion),
    "c four players": skeleton(s.FourPlayers),
    "d bilevel plug-in": skeleton(s.AdversarialPair, s.Bilevel),
    "e term and gradient, around d": skeleton(s.AdversarialPair, s.TermAndGradient, s.Bilevel),
    "f embeddings": skeleton(s.Embeddings, s.Bilevel),
    "g bootstrap": skeleton(s.Bootstrap),
    "h clients": skeleton(s.Federated),
    "i many teachers": skeleton(s.ManyTeachers),
}


def state(made):
    """Every number that could differ, by name."""
    found = {
        "rng": made.ctx.rng.get_state(),
        "torch": torch.get_rng_state(),
        "queries": torch.tensor(made.outcome.teacher_queries),
        "steps": torch.tensor(made.outcome.steps),
    }
    for name, part in made.parts().items():
        values = part.state_dict() if hasattr(part, "state_dict") else {}
        found |= {f"{name}/{k}": v.clone() for k, v in values.items() if torch.is_tensor(v)}
        for index in range(part.shard_count() if hasattr(part, "shard_count") else 0):
            found |= {f"{name}/{index}/{k}": v.clone() for k, v in part.shard(index).items()}
    for index, record in enumerate(made.watch.diagnosis.records):
        found[f"agreement/{index}"] = torch.tensor(record.agreement)
        found[f"classes/{index}"] = torch.tensor(record.classes)
    return found


def run(build, out=None, *, resume=False):
    made = build(out)
    made.outcome = made.run(resume=resume)
    return made


def precisely(build, out=None):
    torch.set_default_dtype(torch.float64)
    try:
        return run(build, out)
    finally:
        torch.set_default_dtype(torch.float32)


def accumulated():
    """One update in three slices, the last of which has one row: fewer than processes."""
    torch.manual_seed(4)
    student = nn.Linear(4, 3).double()
    fixed = nn.Linear(4, 3).double()

    def loss(model, batch):
        answer, wanted = predict(model, batch.inputs), predict(fixed, batch.inputs)
        total = batch.mean(l1_logits(answer.logits, wanted.logits))
        total = total + class_balance_loss(answer.logits)
        return Loss({"l1": total}, total, batch.inputs, wanted, answer)

    ctx = kd().ctx
    optimizer = ctx.optimizer("one", student.parameters(), s.sgd(0.1))
    inputs = torch.randn(7, 4, dtype=torch.float64)
    step = ctx.update("student", student, loss, Batch(inputs), optimizer, accumulate=3, clip=0.1)
    assert torch.equal(step.loss.inputs, inputs)
    return [student.weight.detach(), step.loss.total, step.loss.student.logits]


class Apart(DropAndWeight):
    """Draws more often in one process than in the other."""

    def setup(self, task, teachers, student, ctx):
        self.rng = ctx.rng

    def student_batch(self, batch):
        torch.rand(1 + parallel.rank(), generator=self.rng)
        return batch


class BreaksInOne(DropAndWeight):
    """A weight that is no number, on a row that the second process has."""

    def student_batch(self, batch):
        self.calls += 1
        weights = torch.ones(len(batch))
        weights[-1] = float("nan") if self.calls == 3 else 1.0
        return batch.weighted(weights)


def interrupted(out):
    """The second process alone gets a signal, in the middle of a run."""

    def build(out):
        made = kd(out, rounds=50)
        after = made._after_step

        def step(one):
            if parallel.rank() == 1 and made.ctx.progress.steps == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            after(one)

        made._after_step = step
        return made

    run(build, out)


def streams():
    """What a loss draws in each of two updates of 5 rows, and where the generators stand then."""
    ctx = kd().ctx
    module = nn.Linear(2, 1)
    optimizer = ctx.optimizer("one", module.parameters(), s.sgd())
    drawn = []

    def loss(model, batch):
        total = batch.mean(model(batch.inputs)[:, 0].square())
        drawn.append(torch.rand(3))
        drawn.append(torch.rand(1, generator=ctx.rng))
        torch.rand(len(batch), generator=ctx.rng)
        return Loss({"squares": total}, total)

    for _ in range(2):
        ctx.update("source", module, loss, Batch(torch.ones(5, 2)), optimizer)
    return drawn, [torch.get_rng_state(), ctx.rng.get_state()]


def failure(act):
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def work(rank, folder, cases):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    found = {case: CASES[case](Path(folder)) for case in cases}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def dropping(out=None, **given):
    return kd(out, norm=True, dropout=0.4, rows=7, **given)


def resumed(folder):
    """Two processes: whole, and cut short by a budget and resumed; and what one has begun."""
    whole = run(dropping, folder / "whole")
    run(lambda out: dropping(out, settings={"max_steps": 3}), folder / "cut")
    again = run(dropping, folder / "cut", resume=True)
    run(lambda out: dropping(out, settings={"max_steps": 3}), folder / "left")
    onward = run(dropping, folder / "alone", resume=True)
    return state(whole), state(again), state(onward)


CASES = {
    "equal": lambda folder: {name: state(precisely(build)) for name, build in EQUAL.items()},
    "accumulated": lambda folder: accumulated(),
    "plain float": lambda folder: state(run(dfad, folder / "dfad")),
    "resumed": resumed,
    "streams": lambda folder: streams(),
    "nan": lambda folder: failure(lambda: run(lambda out: kd(plugins=(BreaksInOne,)))),
    "bf16": lambda folder: state(run(lambda out: kd(norm=True, settings={"precision": "bf16"})))[
        "method.student/0.weight"
    ],
    "apart": lambda folder: failure(
        lambda: run(lambda out: kd(out, plugins=(Apart,)), folder / "a")
    ),
    "signal": lambda folder: failure(lambda: interrupted(folder / "signal")),
    "compile": lambda folder: failure(lambda: kd(settings={"compile": True})),
    "device": lambda folder: failure(lambda: kd(settings={"device": "cuda:0"})),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of two processes, and what each of them found."""
    folder = tmp_path_factory.mktemp("two")
    run(lambda out: dropping(out, settings={"max_steps": 3}), folder / "alone")
    torch.multiprocessing.spawn(work, args=(str(folder), list(CASES)), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_both_processes_end_with_the_same(two):
    first, second = two[1]
    for name, found in first["equal"].items():
        different = [k for k, v in found.items() if not torch.equal(v, second["equal"][name][k])]
        assert different == [], name


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_come_to_what_one_comes_to(name, two):
    expected = state(precisely(EQUAL[name]))
    found = two[1][0]["equal"][name]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **CLOSE, msg=lambda m, key=key: f"{key}: {m}")


def test_slices_of_a_batch_are_shared_too(two):
    for value, expected in zip(two[1][0]["accumulated"], accumulated(), strict=True):
        torch.testing.assert_close(value, expected, **CLOSE)


def test_the_first_process_logs_what_one_would_log(two, tmp_path):
    run(dfad, tmp_path)
    found, expected = (
        [row for row in read_metrics(path / "metrics.jsonl") if row["kind"] == "step"]
        for path in (two[0] / "dfad", tmp_path)
    )
    assert len(found) == len(expected) > 10
    for row, wanted in zip(found, expected, strict=True):
        assert (row["step"], row["role"]) == (wanted["step"], wanted["role"])
        # float32: twelve steps of Adam, whose first ones divide by small gradients.
        assert row["terms"] == pytest.approx(wanted["terms"], rel=1e-3, abs=1e-5)


def test_halves_are_shared_too(two):
    alone = run(lambda out: kd(norm=True, settings={"precision": "bf16"}))
    weight = state(alone)["method.student/0.weight"]
    # bfloat16 has 8 bits of mantissa.
    torch.testing.assert_close(two[1][0]["bf16"], weight, rtol=2e-2, atol=2e-3)


def test_a_resumed_run_ends_bit_identical(two):
    whole, again, _ = two[1][0]["resumed"]
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []


def test_two_processes_go_on_where_one_stopped_and_one_where_two_did(two):
    assert two[1][0]["resumed"][2]["steps"] == STEPS
    assert run(dropping, two[0] / "left", resume=True).outcome.steps == STEPS
    for name in ("alone", "left"):
        steps = {row["step"] for row in read_metrics(two[0] / name / "metrics.jsonl")}
        assert steps == set(range(1, STEPS + 1))


def test_each_process_draws_its_own_dropout_and_all_go_on_alike(two):
    before = torch.get_rng_state()
    (first, ends), (second, other_ends) = (found["streams"] for found in two[1])
    for index in range(2):
        mine, other = first[2 * index], second[2 * index]
        assert not torch.equal(mine, other)
        # A method's own stream says the same in both.
        assert torch.equal(first[2 * index + 1], second[2 * index + 1])
    assert not torch.equal(first[0], first[2])
    # Two rows and three: the stream would stand apart.
    assert all(torch.equal(end, other) for end, other in zip(ends, other_ends, strict=True))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nan", "NonFiniteLossError: the loss became NaN or infinite at step 3"),
        ("apart", "ContractError: weights or generators are not the same in all 2 processes"),
        ("signal", "Interrupted: stopped at step 5; --resume goes on from step 4"),
        ("device", "RecipeError: got device 'cuda:0'"),
        ("compile", "RecipeError: trainer.compile: got true for 2 processes"),
    ],
)
def test_all_processes_stop_together(case, message, two):
    assert [found[case].startswith(message) for found in two[1]] == [True, True], two[1][0][case]


def torchrun(*arguments, **given):
    """Two processes of the command line, as a user starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*command, "--nproc-per-node", "2", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **given,
    )


def told(process, timeout=240):
    """Exit code, stdout and stderr; nothing is left behind."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


@pytest.mark.slow
def test_torchrun_runs_a_recipe_and_only_one_process_talks(tmp_path):
    out = tmp_path / "run"
    arguments = ("-m", "vestige", "run", "kd", "--preset", "smoke", "--out", str(out))
    code, said, _ = told(torchrun(*arguments))
    assert (code, said.count("teacher queries")) == (0, 1)
    assert json.loads((out / "run.json").read_text())["processes"] == 2
    assert json.loads((out / "summary.json").read_text())["complete"]
    before = (out / "summary.json").read_bytes()

    code, said, complaint = told(torchrun(*arguments))
    assert (code, said) == (1, "")
    assert complaint.count("is not empty; add --resume") == 1
    assert "(exitcode: 2)" in complaint
    assert (out / "summary.json").read_bytes() == before


@pytest.mark.slow
def test_a_mistake_in_the_recipe_is_told_once(tmp_path):
    mistake = ("--set", "config.batch_sise=3")
    code, _, complaint = told(torchrun("-m", "vestige", "run", "kd", *mistake))
    assert (code, complaint.count("batch_size")) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [True, False], ids=["Ctrl-C", "SIGTERM to torchrun"])
def test_torchrun_is_interrupted_and_goes_on(everyone, tmp_path):
    out = tmp_path / "run"
    settings = ("--set", "config.iterations=2", "--set", "trainer.evaluate_every=1000")
    arguments = ("-m", "vestige", "run", "dfad", "--preset", "smoke", *settings, "--out", str(out))
    process = torchrun(*arguments, "--set", "config.rounds=100000")
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.5)
    if everyone:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    _, _, complaint = told(process)
    assert complaint.count("vestige: stopped at step") == 1
    assert "terminate called" not in complaint
    assert list((out / "checkpoints").glob("*.safetensors"))
    before = len(read_metrics(out / "metrics.jsonl"))

    more = ("--set", "config.rounds=100000", "--resume", "--set", "trainer.max_steps=1")
    code, _, complaint = told(torchrun(*arguments, *more))
    assert code == 0, complaint
    assert len(read_metrics(out / "metrics.jsonl")) <= before + 2


SCRIPT = """
import sys
import torch
import vestige
from torch import nn

def net(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(),
                         nn.Linear(width, 3))

torch.manual_seed(0)
teacher = net(8)
torch.seed()
for name in ("first", "second"):
    report = vestige.distill(
        teacher, net(4), spec=vestige.InputSpec.image(1, 8, 8), num_classes=3, device="cpu",
        config={"rounds": 2, "iterations": 2, "student_steps": 1, "batch_size": 8,
                "generator_width": 4, "latent_dim": 5},
        out=f"{sys.argv[1]}/{name}",
    )
    weights = nn.utils.parameters_to_vector(report.student.parameters()).detach().double()
    print(name, repr(float(weights.sum())), report.summary["steps"])
"""


@pytest.mark.slow
def test_distill_in_a_script_of_torchrun(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    code, said, complaint = told(torchrun(str(tmp_path / "script.py"), str(tmp_path)))
    assert code == 0, complaint
    # Two processes, whose students began differently, end with the same; each of two calls.
    assert len(said.splitlines()) == 4 and len(set(said.splitlines())) == 2
