"""What every registered method holds; a new file in `vestige.methods` is picked up by itself."""

import copy
import functools
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import DirectClients, skewed
from ngram import TOPICS, NGram, made_up
from pydantic import BaseModel
from torch import Tensor, nn

from vestige.core.functional import functional
from vestige.core.protocols import Source, StudentUpdate
from vestige.core.texts import to_bytes
from vestige.core.types import (
    Access,
    Batch,
    InputSpec,
    Loss,
    Prediction,
    Requires,
    Step,
    count_rows,
    pick_rows,
)
from vestige.errors import ContractError, RecipeError
from vestige.models.factory import build_model
from vestige.recipes.build import build_method, build_plugins
from vestige.recipes.catalog import METHODS
from vestige.sources.audio import AudioSource
from vestige.sources.images import TensorSource
from vestige.sources.noise import NoiseSource
from vestige.tasks.classification import Classification
from vestige.tasks.speech import Speech
from vestige.tasks.text import Text
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.checkpoint import CheckpointStore
from vestige.training.context import RunContext
from vestige.training.tracking import Event
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.image(1, 8, 8)
ROUNDS, ROWS = 2, 8
# Applied where a method's Config has the field.
SMALL = {
    "rounds": ROUNDS,
    "iterations": 2,
    "student_steps": 2,
    "batch_size": ROWS,
    "generator_width": 4,
    "latent_dim": 8,
    "replay_size": 12,
    "warmup": 0,
    "inversion_steps": 2,
    "synthesis_batch_size": ROWS,
    "bank_size": 12,
    "negatives": 4,
    "head_queries": 2,
    "head_dim": 4,
    "label_rounds": 2,
    "guess_steps": 2,
    "difficulty_steps": 2,
    "length": 8,
    # A tenth of them, held back, is one batch.
    "samples": 10 * ROWS,
    "round_texts": 16 * ROWS,
    "epochs": ROUNDS,
    "active": 3,
    "local_steps": 2,
    "generator_steps": 2,
    "generator_batch_size": ROWS,
    "server_batch_size": ROWS,
    "head_batch_size": ROWS,
    "hidden_dim": 8,
    "drop_every": 1,
}
OPTIONS = {
    "bn_weight": 0.5,
    "balance_weight": 0.5,
    "replay": 0.5,
    "student_mode": "eval",
    "warmup": 1,
    "meta": "reptile",
    "leak_latent_grad": True,
    "adversarial_weight": 1.0,
    "low_resolution_steps": 1,
    "inversion_schedule": "cosine",
    "z_policy": "fresh",
    "generator_mode": "train",
    "log_base": "e",
    "selection": "epoch",
    "split_bn": True,
    "freeze_encoder": True,
    "mask_share": 0.4,
    "shortest": 5,
    "base": "scaffold",
    "tune_epochs": 1,
    "share_weights": True,
    "counts": "held",
    "generator_update": "sequential",
    "transport": "soft-labels",
    "bn_policy": "local",
}
# What a method for sequences needs, which the tiny image classifiers are not.
AUDIO = InputSpec.audio(0.1, 8000)
SAID = to_bytes(["one", "two", "two", "one"], 8)
TEXT = InputSpec.text(128)
NEWS = made_up(120)
# Kinds of tasks that there are tiny networks for here, first come first served.
KINDS = ("classification", "speech", "text")


def kind_of(name: str) -> str:
    """The kind of task that a method is tried on; "" where it is tried elsewhere."""
    tasks = METHODS.get(name).requires.tasks
    return next((kind for kind in KINDS if kind in tasks), "")


NAMES = [name for name in METHODS.names() if kind_of(name)]
CLOSED = [name for name in NAMES if "*" in METHODS.get(name).requires.closed_to]
CASES = [
    pytest.param(name, options, id=f"{name}-{'options' if options else 'published'}")
    for name in NAMES
    for options in ({}, OPTIONS)
    if not options or set(options) & set(METHODS.get(name).Config.model_fields)
]
# Those on which plug-ins can work.
OPEN = [case for case in CASES if case.values[0] not in CLOSED]


@dataclass
class Job:
    """A method that is built and not yet run, with what it was built from."""

    cfg: Any
    method: Any
    task: Any
    teachers: list[Any]
    student: nn.Module
    sources: Mapping[str, Source]
    seed: int

    @property
    def nets(self) -> dict[str, nn.Module]:
        """Every network by the name that `passes` uses for it."""
        teacher = dict.fromkeys(["teacher"][: len(self.teachers)], *self.teachers[:1])
        parts = {"student": self.student, **teacher, **self.method.parts()}
        return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def assemble(
    name: str,
    options: Mapping[str, Any],
    teacher: nn.Module,
    student: nn.Module,
    *,
    seed: int = 0,
) -> Job:
    """The method at the smallest size, on copies of the networks."""
    method = METHODS.get(name)
    values = {**SMALL, **options}
    fields = method.Config.model_fields
    cfg = method.Config(**{key: value for key, value in values.items() if key in fields})
    task, teacher, student = fitting(name, teacher, student)
    least, most = method.requires.teachers
    count = min(max(1, least), most)
    teachers: list[Any] = [
        WhiteBoxTeacher(one) if isinstance(one, nn.Module) else one
        for one in (copy.deepcopy(teacher) for _ in range(count))
    ]
    student = copy.deepcopy(student)
    sources = {source: source_of(source, seed) for source in method.requires.sources}
    built = build_method(name, cfg, task, teachers, student, sources, seed)
    if isinstance(clients := sources.get("clients"), DirectClients):
        clients.client = built.client
    return Job(cfg, built, task, teachers, student, sources, seed)


def fitting(name: str, teacher: nn.Module, student: nn.Module) -> tuple[Any, Any, Any]:
    """A task that the method is for, with its teacher and student: the given ones for images.

    Others read sequences, and draw while they train if the given student does.
    """
    kind = kind_of(name)
    if kind == "classification":
        return Classification(SPEC, 3), teacher, student
    pytest.importorskip("transformers")
    rate = 0.1 if any(isinstance(layer, nn.Dropout) for layer in student.modules()) else 0.0
    if kind == "speech":
        pytest.importorskip("jiwer")
        task, sequences = Speech(AUDIO, 8), recognizer()
        made = copy.deepcopy(sequences).with_layers(decoder_layers=1)
    else:
        task, sequences = Text(TEXT, len(TOPICS)), reader()
        made = copy.deepcopy(sequences).with_layers(layers=1)
        if METHODS.get(name).requires.access == Access.LABELS:
            # Nothing is asked of it but what it writes.
            sequences = NGram(NEWS)
    for layer in made.modules():
        if isinstance(getattr(layer, "dropout", None), float):
            layer.dropout = rate
        if isinstance(layer, nn.Dropout):
            layer.p = rate
    return task, sequences, made


@functools.cache
def reader() -> Any:
    """A classifier of texts of some thousand weights that knows its words and nothing else."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        args = {"layers": 2, "width": 8, "heads": 2, "vocabulary": 120, "tokens": 12}
        made: Any = build_model("bert", TEXT, len(TOPICS), dropout=0.0, **args)
    made.learn_vocabulary(to_bytes([text for text, _ in NEWS], TEXT.shape[0]))
    return made.eval()


@functools.cache
def recognizer() -> Any:
    """A recogniser of some thousand weights that has learned when to stop."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        made: Any = build_model("whisper", AUDIO, 8, width=8, ffn=8, mel_bins=8, max_tokens=5)
        made.learn_vocabulary(SAID)
        optimizer = torch.optim.Adam(made.parameters(), 3e-2)
        for _ in range(25):
            loss = made.training_loss(torch.randn(4, *AUDIO.shape) * 0.1, SAID)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        made.zero_grad()
    return made.eval()


def source_of(name: str, seed: int) -> Source:
    """Noise, or what a method needs instead: numbered images or recordings, or clients."""
    if name == "clients":
        return DirectClients(skewed(4, SPEC.shape, 3), seed=seed)
    if name == "audio":
        sounds = torch.randn(20, *AUDIO.shape, generator=torch.Generator().manual_seed(7)) * 0.1
        return AudioSource(sounds, AUDIO.sample_rate_hz, origin="unlabelled", name="heap")
    if name != "foreign":
        return NoiseSource(SPEC)
    rows = torch.randn(40, *SPEC.shape, generator=torch.Generator().manual_seed(7))
    return TensorSource(rows, origin="foreign", name="heap")


def trainer(job: Job, out: Path | None = None, **given: Any) -> Trainer:
    return Trainer(
        job.method,
        job.task,
        teachers=job.teachers,
        student=job.student,
        sources=job.sources,
        seed=job.seed,
        out=out,
        config=TrainerConfig(device="cpu", log_every=1),
        **given,
    )


class CountingContext(RunContext):
    """Counts the steps of every optimizer by the network that it moves.

    While an update runs, `moving` holds the weights that it is about to move.
    """

    def __init__(
        self,
        nets: Mapping[str, nn.Module],
        counts: Counter[str],
        moving: set[int],
        **given: Any,
    ) -> None:
        super().__init__(**given)
        self.nets, self.counts, self.moving = nets, counts, moving

    def update(self, role: Any, model: Any, loss_fn: Any, batch: Any, *given: Any, **more: Any):
        self.moving |= {id(p) for made in given for g in made.param_groups for p in g["params"]}
        step = super().update(role, model, loss_fn, batch, *given, **more)
        self.moving.clear()
        return step

    def optimizer(self, *args: Any, **given: Any) -> torch.optim.Optimizer:
        made = super().optimizer(*args, **given)
        moved = {id(p) for group in made.param_groups for p in group["params"]}
        owners = [n for n, net in self.nets.items() if moved & {id(p) for p in net.parameters()}]
        # Latents belong to no network.
        made.register_step_post_hook(lambda *_: self.counts.update(f"{n}_step" for n in owners))
        return made

    def took(self, role: Any, *given: Any) -> Step:
        self.counts[f"{role}_step"] += 1
        return super().took(role, *given)


def drive(
    job: Job,
    *,
    plugins: Mapping[str, Any] | None = None,
    counts: Counter[str] | None = None,
    moving: set[int] | None = None,
) -> list[Step]:
    """Run the method without the trainer, whose diagnosis makes passes of its own."""
    ctx = CountingContext(
        job.nets,
        Counter() if counts is None else counts,
        set() if moving is None else moving,
        seed=job.seed,
        device=torch.device("cpu"),
        plugins=plugins or {},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=lambda: True,
    )
    for plugin in (plugins or {}).values():
        plugin.setup(job.task, job.teachers, job.student, ctx)
    return list(job.method.run(ctx))


class Plain:
    """What all test-only plug-ins share."""

    Config = BaseModel
    requires = Requires()

    def setup(self, task: Any, teachers: Any, student: nn.Module, ctx: Any) -> None:
        self.ctx = ctx

    def parts(self) -> dict[str, Any]:
        return {}


class Spy(Plain):
    """Looks at every student update, then lets it pass."""

    def __init__(self, look: Callable[[StudentUpdate, Any], None]) -> None:
        self.look = look
        self.updates = 0

    def student_gradient(self, update: StudentUpdate, following: Callable[[], Loss]) -> Loss:
        self.updates += 1
        self.look(update, self.ctx)
        return following()


class Weigh(Plain):
    """Gives all rows one weight and keeps the first update's loss and gradient."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.gradients: dict[str, Tensor] = {}
        self.all_zero = True

    def student_batch(self, batch: Batch) -> Batch:
        return batch.weighted(torch.full((len(batch),), self.weight))

    def student_gradient(self, update: StudentUpdate, following: Callable[[], Loss]) -> Loss:
        loss = following()
        found = {n: p.grad.clone() for n, p in update.params.items() if p.grad is not None}
        self.gradients = self.gradients or found
        self.all_zero &= not any(grad.any() for grad in found.values())
        return loss


class Drop(Plain):
    """Keeps the first `keep` rows of a student batch."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.dropped = 0
        self.known = 0

    def student_batch(self, batch: Batch) -> Batch:
        # What the teacher said already is not asked again.
        self.known += "teacher" in batch.extra
        self.dropped += 0 if "teacher" in batch.extra else max(0, len(batch) - self.keep)
        return batch.rows(slice(0, self.keep))


class Extra(Plain):
    """Adds a term to the source's loss."""

    def source_terms(self, loss: Loss, batch: Batch) -> dict[str, Tensor]:
        assert loss.inputs is not None
        given = loss.inputs if isinstance(loss.inputs, Tensor) else next(iter(loss.inputs.values()))
        assert given.requires_grad
        return {"extra": 0.1 * given.square().mean()}


class Restless(Plain):
    """Weights rows at random and scales the gradient by a running norm: chance and state."""

    def __init__(self) -> None:
        self.norm = torch.ones(())

    def setup(self, task: Any, teachers: Any, student: nn.Module, ctx: Any) -> None:
        self.rng = ctx.generator("restless")

    def parts(self) -> dict[str, Any]:
        return {"norm": self}

    def state_dict(self) -> dict[str, Tensor]:
        return {"norm": self.norm}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.norm = state["norm"]

    def student_batch(self, batch: Batch) -> Batch:
        return batch.weighted(torch.rand(len(batch), generator=self.rng) + 0.5)

    def student_gradient(self, update: StudentUpdate, following: Callable[[], Loss]) -> Loss:
        loss = following()
        grads = [p.grad for p in update.params.values() if p.grad is not None]
        self.norm = 0.9 * self.norm + 0.1 * torch.stack([g.norm() for g in grads]).norm()
        for grad in grads:
            grad.div_(self.norm)
        return loss


def state_of(network: Any) -> dict[str, Any]:
    if not isinstance(network, nn.Module):
        # All that a teacher which is no network knows.
        return copy.deepcopy(dict(network.table))
    return {name: value.clone() for name, value in network.state_dict().items()}


def learned(job: Job) -> dict[str, Any]:
    """What a run may change: the student, and the networks that clients keep for themselves."""
    clients = job.sources.get("clients")
    kept = clients.states if isinstance(clients, DirectClients) else {}
    return {"student": state_of(job.student), "clients": dict(kept)}


def equal(first: Any, second: Any) -> bool:
    """Whether nested states are the same bit for bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, Mapping):
        return set(first) == set(second) and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    if hasattr(first, "shape"):
        return bool((first == second).all())
    return bool(first == second)


def checkpoint(out: Path) -> dict[str, Any]:
    """The last checkpoint without the time it took."""
    state = CheckpointStore(out / "checkpoints").load()
    assert state is not None
    del state["seconds"]
    return state


def hooks(module: nn.Module) -> int:
    return sum(
        len(getattr(layer, kind))
        for layer in module.modules()
        for kind in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    )


def test_every_method_is_covered_or_of_another_task():
    assert {"dfad", "kd"} <= set(NAMES)
    others = set(METHODS.names()) - set(NAMES)
    assert not any(set(KINDS) & set(METHODS.get(name).requires.tasks) for name in others)
    assert {kind_of(name) for name in NAMES} == set(KINDS)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_two_rounds_leave_a_trained_student_and_an_untouched_teacher(
    name, options, tiny_teacher, dropout_student, tmp_path
):
    job = assemble(name, options, tiny_teacher, dropout_student)
    teachers = [state_of(teacher) for teacher in job.teachers]
    before = learned(job)
    run = trainer(job, tmp_path)
    outcome = run.run()

    assert outcome.complete
    assert outcome.steps == run.ctx.progress.steps > 0
    assert outcome.result.kind
    for frozen, teacher in zip(teachers, job.teachers, strict=True):
        assert equal(frozen, state_of(teacher))
        if not isinstance(teacher, nn.Module):
            continue
        assert not any(layer.training for layer in teacher.modules())
        assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert not equal(before, learned(job))
    assert all(torch.isfinite(value).all() for value in job.student.state_dict().values())
    assert not any(layer.training for layer in job.student.modules())
    assert all(parameter.grad is None for parameter in job.student.parameters())
    assert {key: hooks(net) for key, net in job.nets.items()} == dict.fromkeys(job.nets, 0)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_steps_carry_finite_losses_without_a_graph(name, options, tiny_teacher, dropout_student):
    steps = drive(assemble(name, options, tiny_teacher, dropout_student))
    losses = [step.loss for step in steps if step.loss is not None]
    assert losses
    for loss in losses:
        tensors = [loss.total, *loss.terms.values()]
        assert all(math.isfinite(float(value)) for value in tensors)
        seen = loss.inputs.values() if isinstance(loss.inputs, Mapping) else [loss.inputs]
        rows = [*seen, *(p and p.logits for p in (loss.teacher, loss.student))]
        assert not any(value.requires_grad for value in (*tensors, *rows) if value is not None)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_seed_decides_the_weights(name, options, tiny_teacher, dropout_student):
    def trained(seed: int, noise: int) -> dict[str, Any]:
        torch.manual_seed(noise)  # what ran before must not matter
        job = assemble(name, options, tiny_teacher, dropout_student, seed=seed)
        trainer(job).run()
        return learned(job)

    first = trained(0, noise=1)
    assert equal(first, trained(0, noise=2))
    assert not equal(first, trained(1, noise=1))


@pytest.mark.parametrize("share", [0.0, 0.4, 0.7, 1.0])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_killed_and_resumed_run_is_the_uninterrupted_one(
    name, options, share, tiny_teacher, dropout_student, tmp_path
):
    def judge(student: nn.Module) -> dict[str, float]:
        return {"accuracy": float(torch.rand(())) if student.training else 1.0}

    # Clients outlive the server.
    met: dict[Path, DirectClients] = {}

    def run(out: Path, resume: bool = False, callback: Callable[[Event], None] = print) -> Job:
        job = assemble(name, options, tiny_teacher, dropout_student)
        if isinstance(clients := job.sources.get("clients"), DirectClients):
            known = met.setdefault(out, clients)
            clients.states, clients.before = known.states, known.before
        plugins = {} if name in CLOSED else {"restless": Restless()}
        run = trainer(job, out, evaluate=judge, plugins=plugins, callbacks=[callback])
        run.run(resume=resume)
        return job

    events: list[str] = []
    whole = run(tmp_path / "whole", callback=lambda event: events.append(event.kind))
    last = len(events) - 1
    # Kinds differ along a run: a start, steps, the ends of rounds, the end.
    stop = round(share * last)

    class Killed(Exception):
        pass

    seen: list[str] = []

    def kill(event: Event) -> None:
        seen.append(event.kind)
        if len(seen) > stop:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "killed", callback=kill)
    assert seen == events[: stop + 1]
    resumed = run(tmp_path / "killed", resume=True, callback=lambda event: None)

    assert equal(learned(whole), learned(resumed))
    for key, net in whole.nets.items():
        assert equal(state_of(net), state_of(resumed.nets[key])), key
    # Optimizers, generators, memories, counts, flags and the plug-in as well.
    assert equal(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed"))


@pytest.mark.parametrize(("name", "options"), OPEN)
def test_every_student_pass_of_a_loss_goes_through_model(
    name, options, tiny_teacher, dropout_student
):
    job = assemble(name, options, tiny_teacher, dropout_student)
    passes: list[str] = []
    job.student.register_forward_hook(lambda *_: passes.append("live"))

    def look(update: StudentUpdate, ctx: Any) -> None:
        elsewhere = functional(update.model, {})

        def record(*args: Any, **named: Any) -> Any:
            passes.append("given")
            return elsewhere(*args, **named)

        buffers = {name: buffer.clone() for name, buffer in job.student.named_buffers()}
        passes.clear()
        update.loss_fn(record, update.batch)
        # The recorded callable runs the live module's forward, hence one "live" for each "given".
        assert passes == ["given", "live"] * (len(passes) // 2)
        assert "given" in passes
        assert equal(buffers, dict(job.student.named_buffers()))

    spy = Spy(look)
    drive(job, plugins={"spy": spy})
    assert spy.updates > 0


@pytest.mark.parametrize(("name", "options"), OPEN)
def test_the_students_loss_draws_nothing_writes_nothing_and_is_repeatable(
    name, options, tiny_teacher, tiny_student
):
    job = assemble(name, options, tiny_teacher, tiny_student)

    def look(update: StudentUpdate, ctx: Any) -> None:
        batch = update.batch
        fields = {key: getattr(batch, key) for key in ("inputs", "labels", "latent", "weights")}
        before = copy.deepcopy({**fields, "extra": dict(batch.extra)})
        chance = ctx.rng.get_state().clone(), torch.get_rng_state().clone()
        first = update.loss_fn(functional(update.model, {}), batch)
        second = update.loss_fn(functional(update.model, {}), batch)
        assert torch.equal(ctx.rng.get_state(), chance[0])
        assert torch.equal(torch.get_rng_state(), chance[1])
        for key, value in fields.items():
            assert getattr(batch, key) is value
        assert equal(before, {**fields, "extra": dict(batch.extra)})
        assert torch.equal(first.total, second.total)

    spy = Spy(look)
    drive(job, plugins={"spy": spy})
    assert spy.updates > 0


@pytest.mark.parametrize(("name", "options"), OPEN)
def test_the_teacher_is_aligned_with_the_inputs_row_by_row(
    name, options, tiny_teacher, tiny_student
):
    job = assemble(name, options, tiny_teacher, tiny_student)

    def look(update: StudentUpdate, ctx: Any) -> None:
        order = torch.arange(len(update.batch)).flip(0)
        straight = update.loss_fn(functional(update.model, {}), update.batch)
        turned = update.loss_fn(functional(update.model, {}), update.batch.rows(order))
        assert straight.inputs is not None
        assert turned.inputs is not None
        assert equal(pick_rows(straight.inputs, order), turned.inputs)
        for role in ("teacher", "student"):
            one, other = getattr(straight, role), getattr(turned, role)
            if role == "teacher" and one is None and other is None:
                continue  # It said what it had to say when it made them.
            # Rounding: BatchNorm of the student sums the rows in another order.
            torch.testing.assert_close(one.logits[order], other.logits, rtol=1e-4, atol=1e-5)

    spy = Spy(look)
    drive(job, plugins={"spy": spy})
    assert spy.updates > 0


@pytest.mark.parametrize(("name", "options"), OPEN)
def test_weights_of_a_plug_in_are_honoured(name, options, tiny_teacher, tiny_student):
    def first_gradient(weight: float) -> Weigh:
        job = assemble(name, options, tiny_teacher, tiny_student)
        weigh = Weigh(weight)
        drive(job, plugins={"weigh": weigh})
        return weigh

    whole, nothing, turned = (first_gradient(weight) for weight in (1.0, 0.0, -1.0))
    assert not whole.all_zero
    assert nothing.all_zero
    for key, grad in whole.gradients.items():
        assert torch.equal(turned.gradients[key], -grad), key


@pytest.mark.parametrize(("name", "options"), OPEN)
def test_zero_weights_leave_the_students_weights(name, options, tiny_teacher, tiny_student):
    # Weight decay moves weights without any gradient.
    job = assemble(name, {**options, "student_weight_decay": 0.0}, tiny_teacher, tiny_student)
    before = {key: value.clone() for key, value in job.student.named_parameters()}
    drive(job, plugins={"weigh": Weigh(0.0)})
    assert equal(before, dict(job.student.named_parameters()))


@pytest.mark.parametrize(("name", "options"), OPEN)
def test_rows_that_a_plug_in_drops_are_not_asked(name, options, tiny_teacher, tiny_student):
    whole = assemble(name, options, tiny_teacher, tiny_student)
    drive(whole)
    fewer, drop = assemble(name, options, tiny_teacher, tiny_student), Drop(ROWS - 3)
    drive(fewer, plugins={"drop": drop})
    assert drop.dropped > 0 or drop.known > 0
    asked = [sum(teacher.queries for teacher in job.teachers) for job in (whole, fewer)]
    # A teacher that wrote the inputs is not asked about them.
    asks = len(whole.teachers) if whole.method.passes(whole.cfg).get("teacher_forward") else 0
    assert asked[0] - asked[1] == drop.dropped * asks


@pytest.mark.parametrize(
    ("name", "options"),
    [case for case in CASES if kind_of(str(case.values[0])) == "classification"],
)
def test_a_frozen_batchnorm_of_the_student_stays_frozen(
    name, options, tiny_teacher, dropout_student
):
    dropout_student[1].eval().requires_grad_(False)
    job = assemble(name, options, tiny_teacher, dropout_student)
    norm = job.student[1]
    before, others = state_of(norm), learned(job)
    trainer(job).run()
    assert equal(before, state_of(norm))
    assert not equal(others, learned(job))
    for kept in learned(job)["clients"].values():
        named = {name: value for group in kept.values() for name, value in group.items()}
        for key, value in named.items():
            assert not key.startswith("1.") or equal(before[key.removeprefix("1.")], value)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_passes_are_what_hooks_count(name, options, tiny_teacher, tiny_student):
    # Passes are those of a round of the student's loop; a warm-up precedes it, tuning follows.
    shorter = {**options, "warmup": 0, "tune_epochs": 0}
    job = assemble(name, shorter, tiny_teacher, tiny_student)
    if not job.method.passes(job.cfg):
        pytest.skip("it does not say, since they go by what clients send")
    counts: Counter[str] = Counter()
    moving: set[int] = set()

    def count(net: str) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any], output: Any
        ) -> None:
            # A copy stands for the network of somebody else.
            if module is not job.nets[net]:
                return
            answer = Prediction.of(output).logits
            # Two batches in one call are two passes.
            times = max(1, count_rows(answer) // ROWS) if of_rows(net) else 1
            counts[f"{net}_forward"] += times
            if not answer.requires_grad:
                return
            # A network of the method's own is trained by whatever it is fed with, unless it only
            # judges what another one makes.
            judges = bool(moving) and not moving & {id(p) for p in module.parameters()}
            # Tokens handed over by name are data, embeddings may be what is moved.
            fed = [one for one in (*args[:1], *named.values()) if isinstance(one, Tensor)]
            moved = [one for one in fed if one.requires_grad]
            if (net in ("student", "teacher") or judges) and moved:
                # At the input: a loss may read what lies inside and leave the answer alone.
                once(moved[0], f"{net}_backward_to_input", times)
            else:
                once(answer, f"{net}_backward", times)

        return hook

    def once(value: Tensor, key: str, times: int) -> None:
        def passed(grad: Tensor) -> None:
            counts[key] += times
            # What is moved stays the same tensor from pass to pass.
            handle.remove()

        handle = value.register_hook(passed)

    def of_rows(net: str) -> bool:
        return kind_of(name) == "text" and net in ("student", "teacher")

    for net, module in job.nets.items():
        module.register_forward_hook(count(net), with_kwargs=True)
    drive(job, counts=counts, moving=moving)
    passes = Counter(job.method.passes(job.cfg))
    observed = passes.pop("teacher_observed", 0)
    passes.update(teacher_forward=observed, teacher_backward_to_input=observed)
    assert dict(counts) == {key: value * ROUNDS for key, value in passes.items() if value}


@pytest.mark.parametrize("name", NAMES)
def test_the_module_says_what_it_is(name):
    text = inspect.getdoc(inspect.getmodule(METHODS.get(name))) or ""
    marks = (r"Papers?:", r"Differs from the papers?:", "Cost per round")
    sections = [found.start() for mark in marks if (found := re.search(mark, text))]
    assert len(sections) == len(marks)
    assert sections == sorted(sections)
    assert re.search(r"arXiv\s+\d{4}\.\d{4,5}|Paper: none;", text)
    # "First line the name", and only the name.
    assert len(text.split("\n")[0]) < 100
    assert text.split("\n")[1] == ""


@pytest.mark.parametrize("name", CLOSED)
def test_what_is_closed_refuses_every_plug_in(name):
    with pytest.raises(RecipeError, match="is closed to the plug-ins"):
        build_plugins({"retain": {}}, METHODS.get(name), Classification(SPEC, 3), [])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CLOSED])
def test_a_plug_in_for_sources_works_or_is_refused(name, tiny_teacher, tiny_student):
    roles = {step.role for step in drive(assemble(name, {}, tiny_teacher, tiny_student))}
    job = assemble(name, {}, tiny_teacher, tiny_student)
    if "source" not in roles:
        with pytest.raises(ContractError, match=r"\['extra'\] were not called"):
            trainer(job, plugins={"extra": Extra()}).run()
        return
    steps = drive(job, plugins={"extra": Extra()})
    # A step along a direction of the method's own is no update: it has no loss to add to.
    extended = [step.loss for step in steps if step.role == "source"]
    extended = [loss for loss in extended if loss is None or loss.inputs is not None]
    assert extended
    for loss in extended:
        assert loss is not None
        assert float(loss.terms["extra"]) > 0
    assert trainer(assemble(name, {}, tiny_teacher, tiny_student), plugins={"extra": Extra()}).run()
    assert all("extra" not in step.loss.terms for step in steps if step.role == "student")
