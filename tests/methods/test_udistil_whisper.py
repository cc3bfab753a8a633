"""What the filters and the loss of uDistil-Whisper must hold, at the smallest size."""

import copy
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vestige.core.filtering import FiltersItems
from vestige.core.texts import to_bytes
from vestige.core.types import Batch, InputSpec
from vestige.errors import DataError, RecipeError, TeacherError
from vestige.methods.udistil_whisper import UDistilWhisper, UDistilWhisperConfig
from vestige.models.factory import build_model
from vestige.models.speech import SpeechRecognizer, spoken
from vestige.recipes.build import build_method
from vestige.sources.audio import AudioSource
from vestige.sources.images import TensorSource
from vestige.tasks.speech import Speech
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.checkpoint import CheckpointStore
from vestige.training.tracking import Event
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

pytest.importorskip("transformers")
pytest.importorskip("jiwer")
SPEC = InputSpec.audio(0.1, 8000)
TEXTS = to_bytes(["one two", "three", "two two one", "one"], 32)
SMALL = {"rounds": 2, "iterations": 2, "batch_size": 4, "label_rounds": 2, "student_lr": 1e-2}
ROWS = 12


def tones() -> Tensor:
    time = torch.arange(SPEC.shape[0]) / SPEC.sample_rate_hz
    pitches = torch.tensor([300.0, 700.0, 1500.0, 3000.0])
    return 0.5 * torch.sin(2 * torch.pi * pitches[:, None] * time)


@functools.cache
def taught(seed: int) -> SpeechRecognizer:
    """A recogniser of four tones, each of which has a text."""
    torch.manual_seed(seed)
    made = build_model("whisper", SPEC, 10, width=16, mel_bins=16, max_tokens=6, ffn=32)
    assert isinstance(made, SpeechRecognizer)
    made.learn_vocabulary(TEXTS)
    optimizer = torch.optim.AdamW(made.parameters(), 5e-3)
    for _ in range(90):
        noise = 0.3 * torch.rand(len(TEXTS), 1) * torch.randn(len(TEXTS), *SPEC.shape)
        loss = made.training_loss(tones() + noise, TEXTS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made.zero_grad()
    return made.eval()


def recognizer(seed: int, dropout: float = 0.1) -> SpeechRecognizer:
    """A copy that draws while it trains."""
    made = copy.deepcopy(taught(seed))
    for part in made.modules():
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = dropout
    return made


def waveforms() -> Tensor:
    """Each tone three times, under ever more noise."""
    noise = torch.randn(ROWS, *SPEC.shape, generator=torch.Generator().manual_seed(1))
    return (tones().repeat(3, 1) + torch.arange(ROWS)[:, None] / ROWS * noise).clamp(-1, 1)


def made(
    config: Mapping[str, Any] | None = None,
    *,
    teachers: tuple[SpeechRecognizer, ...] = (),
    student: SpeechRecognizer | None = None,
    sources: Mapping[str, Any] | None = None,
) -> UDistilWhisper:
    networks = teachers or (recognizer(0),)
    task = Speech(SPEC, 10)
    audio = AudioSource(waveforms(), 8000, origin="unlabelled", name="heap")
    method = build_method(
        "udistil-whisper",
        UDistilWhisperConfig(**{**SMALL, **(config or {})}),
        task,
        [WhiteBoxTeacher(copy.deepcopy(one)) for one in networks],
        student or networks[0].with_layers(encoder_layers=1, decoder_layers=1),
        {"audio": audio, **(sources or {})},
        0,
    )
    assert isinstance(method, UDistilWhisper)
    return method


def trainer(method: UDistilWhisper, out: Path | None = None, **given: Any) -> Trainer:
    return Trainer(
        method,
        Speech(SPEC, 10),
        teachers=method.teachers,
        student=method.student,
        sources={"audio": method.audio},
        out=out,
        config=TrainerConfig(device="cpu", log_every=1),
        **given,
    )


def losses(method: UDistilWhisper) -> list[float]:
    found: list[float] = []
    run = trainer(method)
    update = run.ctx.update

    def noted(*args: Any, **given: Any) -> Any:
        step = update(*args, **given)
        found.append(float(step.loss.total))
        return step

    run.ctx.update = noted  # type: ignore[method-assign]
    run.run()
    return found


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_trains_the_student_and_leaves_the_teacher():
    method = made(teachers=(recognizer(0), recognizer(1)), config={"filter": "proxy"})
    teacher, student = state(method.listeners[0]), state(method.student)
    outcome = trainer(method).run()
    assert outcome.steps == 4
    assert same(teacher, state(method.listeners[0]))
    assert not same(student, state(method.student))
    assert not method.student.training
    # Two recognisers on every row, then one on every batch.
    assert outcome.teacher_queries == 2 * ROWS + 4 * 4


def test_a_student_of_all_layers_has_no_kl_and_the_cross_entropy_of_its_teacher():
    teacher = recognizer(0, dropout=0.0)
    method = made(teachers=(teacher,), student=teacher.with_layers())
    heard = teacher.transcribe(waveforms())
    tokens = heard.tokens[:, : 1 + int(heard.written.max())]
    batch = Batch(inputs={"waveforms": waveforms(), "decoder_input_ids": tokens})
    loss = method.imitation(method.student, batch)
    assert float(loss.terms["kl"]) == pytest.approx(0, abs=1e-6)
    expected = -heard.log_probs.sum() / heard.written.sum()
    # Rows were averaged and divided by the mean count, in float32.
    assert float(loss.terms["cross_entropy"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(loss.terms["agreement"]) == 1
    total = 0.8 * loss.terms["cross_entropy"] + loss.terms["kl"]
    assert float(loss.total) == pytest.approx(float(total))


def test_the_weights_and_the_temperature_enter_as_they_are_said():
    teacher = recognizer(0, dropout=0.0)
    student = recognizer(3, dropout=0.0)
    tokens = teacher.tokens_of(["one two", "three"])
    batch = Batch(inputs={"waveforms": waveforms()[:2], "decoder_input_ids": tokens})
    method = made(
        {"ce_weight": 0.3, "kl_weight": 2.0, "temperature": 3.0},
        teachers=(teacher,),
        student=student,
    )
    loss = method.imitation(student, batch)
    asked = teacher(waveforms()[:2], tokens).logits[:, :-1]
    said = student(waveforms()[:2], tokens).logits[:, :-1]
    counted = spoken(tokens, 1, teacher.end)
    p, q = (asked / 3).softmax(-1), (said / 3).softmax(-1)
    kl = 9 * (p * (p / q).log()).sum(-1)[counted].sum() / counted.sum()
    ce = -said.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0][counted].mean()
    assert float(loss.total) == pytest.approx(float(0.3 * ce + 2 * kl), rel=1e-4)


def test_padding_does_not_change_the_loss():
    method = made(teachers=(recognizer(0, dropout=0.0),))
    tokens = method.listeners[0].tokens_of(["one two", "three"])
    wider = torch.cat([tokens, tokens.new_zeros(2, 2)], 1)
    found = [
        float(
            method.imitation(
                method.student.eval(),
                Batch(inputs={"waveforms": waveforms()[:2], "decoder_input_ids": one}),
            ).total
        )
        for one in (tokens, wider)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_confidence_and_entropy_are_those_of_the_written_tokens():
    method = made()
    trainer(method).run()
    heard = method.labels.all()
    for row in range(ROWS):
        count = int(heard.written[row])
        mean = float(heard.log_probs[row].sum()) / count
        assert float(method.scores.values["confidence"][row]) == pytest.approx(math.exp(mean))
        entropy = float(heard.entropies[row].sum()) / count
        assert float(method.scores.values["entropy"][row]) == pytest.approx(entropy)


def test_a_proxy_that_is_the_teacher_agrees_everywhere():
    teacher = recognizer(0)
    method = made({"filter": "proxy", "threshold": 0.5}, teachers=(teacher, teacher))
    trainer(method).run()
    scores = method.scores.values["proxy"]
    assert bool((scores[~scores.isnan()] == 0).all())
    stage = method.filtered()["audio"]
    dropped = {item.reason for item in stage.items if not item.kept}
    assert dropped <= {"empty", "too long", "proxy"}
    assert not any(item.reason == "proxy" for item in stage.items if item.text)


def test_a_threshold_that_all_pass_is_no_filter():
    teachers = (recognizer(0), recognizer(1))
    free = losses(made({"filter": "none"}, teachers=teachers))
    wide = losses(made({"filter": "entropy", "threshold": 1e9}, teachers=teachers))
    narrow = losses(made({"filter": "entropy", "keep_fraction": 0.3}, teachers=teachers))
    assert free == wide
    assert free != narrow


def test_a_smaller_share_keeps_a_subset_and_the_counts_add_up():
    kept: list[set[int]] = []
    for share in (0.3, 0.6, 1.0):
        method = made({"filter": "entropy", "keep_fraction": share})
        trainer(method).run()
        assert isinstance(method, FiltersItems)
        stage = method.filtered()["audio"]
        kept.append({row for row, item in enumerate(stage.items) if item.kept})
        assert sum(stage.counts.values()) == ROWS
        assert len(kept[-1]) == stage.counts["kept"] <= math.ceil(share * ROWS)
    assert kept[0] < kept[1] <= kept[2]


def test_where_all_is_dropped_it_says_so_before_training():
    method = made({"filter": "entropy", "threshold": -1.0})
    student = state(method.student)
    with pytest.raises(DataError, match=r"all of 12 were dropped .*entropy"):
        trainer(method).run()
    assert same(student, state(method.student))


def test_a_shared_frozen_encoder_runs_once_and_does_not_move():
    teacher = recognizer(0)
    student = teacher.with_layers(decoder_layers=1)
    method = made({"freeze_encoder": True}, teachers=(teacher,), student=student)
    calls = {"teacher": 0, "student": 0}

    def count(who: str) -> Any:
        return lambda *_: calls.__setitem__(who, calls[who] + 1)

    before = state(student.encoder)
    hooks = [
        method.listeners[0].encoder.register_forward_hook(count("teacher")),
        student.encoder.register_forward_hook(count("student")),
    ]
    trainer(method).run()
    for hook in hooks:
        hook.remove()
    # Each of the two slices of the pool once, and never while the student learns.
    assert calls == {"teacher": 2, "student": 4}
    assert same(before, state(student.encoder))
    assert all(one.grad is None for one in student.encoder.parameters())


def test_an_encoder_that_is_not_the_teachers_cannot_be_shared():
    with pytest.raises(RecipeError, match="whole encoder"):
        made({"freeze_encoder": True})


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_killed_and_resumed_run_is_the_uninterrupted_one(share, tmp_path):
    def run(out: Path, resume: bool = False, callback: Any = print) -> UDistilWhisper:
        method = made(
            {"filter": "chance", "keep_fraction": 0.5}, teachers=(recognizer(0), recognizer(1))
        )
        trainer(method, out, callbacks=[callback]).run(resume=resume)
        return method

    events: list[str] = []
    whole = run(tmp_path / "whole", callback=lambda event: events.append(event.kind))
    stop = round(share * (len(events) - 1))

    class Killed(Exception):
        pass

    def kill(event: Event) -> None:
        kill.seen += 1  # type: ignore[attr-defined]
        if kill.seen > stop:  # type: ignore[attr-defined]
            raise Killed

    kill.seen = 0  # type: ignore[attr-defined]
    with pytest.raises(Killed):
        run(tmp_path / "parts", callback=kill)
    resumed = run(tmp_path / "parts", resume=True)
    assert same(state(whole.student), state(resumed.student))
    assert whole.labels.all().texts == resumed.labels.all().texts
    first, second = (
        CheckpointStore(tmp_path / one / "checkpoints").load() for one in ("whole", "parts")
    )
    assert first is not None
    assert second is not None
    assert first["queries"] == second["queries"]


def test_the_seed_decides_what_chance_keeps():
    def kept(seed: int) -> list[bool]:
        method = made({"filter": "chance", "keep_fraction": 0.5})
        trainer(method, seed=seed).run()
        return [item.kept for item in method.filtered()["audio"].items]

    assert kept(0) == kept(0) != kept(1)


class Loud:
    """A filter of one's own: loud recordings are better."""

    better = "high"
    needs = ("audio",)

    def scores(self, evidence: Any) -> Tensor:
        rows = evidence.audio.rows(torch.arange(len(evidence.heard.texts)))
        return rows.abs().mean(1).double()


Loud.needs = ()


def test_a_filter_of_ones_own_decides():
    method = made({"filter": f"{__name__}:Loud", "keep_fraction": 0.25})
    trainer(method).run()
    stage = method.filtered()["audio"]
    loud = waveforms().abs().mean(1)
    kept = [row for row, item in enumerate(stage.items) if item.kept]
    whole = [row for row, item in enumerate(stage.items) if item.reason in ("", "filter")]
    assert set(kept) == {row for row in loud.argsort(descending=True)[:3].tolist() if row in whole}


def embedder() -> Any:
    class Toy:
        def embed_audio(self, sounds: Tensor, sample_rate_hz: int) -> Tensor:
            return torch.stack([sounds.mean(1), sounds.std(1)], 1)

        def embed_text(self, texts: list[str]) -> Tensor:
            return torch.tensor([[float(len(text)), 1.0] for text in texts])

    return Toy()


def language_model(texts: list[str]) -> Tensor:
    return torch.tensor([float(len(text)) for text in texts])


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("similarity", {"embedder": f"{__name__}:embedder"}),
        ("likelihood", {"language_model": f"{__name__}:language_model"}),
    ],
)
def test_what_others_know_of_sound_and_text_can_be_plugged_in(name, more):
    method = made({"filter": name, "keep_fraction": 0.5, **more})
    trainer(method).run()
    assert bool(torch.isfinite(method.scores.values[name]).all())
    assert method.filtered()["audio"].chosen == name


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"filter": "proxy"}, "more_teachers"),
        ({"filter": "similarity"}, r"config\.embedder"),
        ({"filter": "likelihood"}, r"config\.language_model"),
        ({"filter": "nothing"}, "confidence"),
        ({"filter": "json:nothing"}, "nothing"),
        ({"filter": "labels"}, "column: text"),
    ],
)
def test_a_filter_that_lacks_something_is_refused_at_once(config, told):
    with pytest.raises(RecipeError, match=told):
        made(config)


def test_labels_are_looked_at_by_their_filter_alone():
    rows = TensorSource(to_bytes(["one two"] * ROWS, 32), origin="real", name="truth")
    method = made({"filter": "labels", "keep_fraction": 0.5}, sources={"transcripts": rows})
    trainer(method).run()
    assert "labels" in method.scores.values
    with pytest.raises(RecipeError, match="leave it out"):
        made(sources={"transcripts": rows})
    few = TensorSource(to_bytes(["one"] * 3, 32), origin="real", name="truth")
    with pytest.raises(RecipeError, match="3 transcripts for 12"):
        made({"filter": "labels"}, sources={"transcripts": few})


def test_a_student_with_other_tokens_is_refused_and_a_fresh_one_takes_them_over():
    other = recognizer(1)
    other.learn_vocabulary(to_bytes(["uno due"], 32))
    with pytest.raises(RecipeError, match="other tokens"):
        made(student=other)
    fresh = build_model("whisper", SPEC, 10, width=16, mel_bins=16, max_tokens=6, ffn=32)
    assert isinstance(fresh, SpeechRecognizer)
    method = made(student=fresh)
    trainer(method).run()
    assert torch.equal(fresh.vocabulary, method.listeners[0].vocabulary)
    with pytest.raises(TeacherError, match="speech recogniser"):
        UDistilWhisper(
            UDistilWhisperConfig(),
            Speech(SPEC, 10),
            [torch.nn.Linear(1, 1)],
            fresh,
            {},  # type: ignore[list-item]
        )
