"""A recogniser: its front end is Whisper's, its scores are its own, its students are copies."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vestige.core.functional import functional
from vestige.core.texts import to_bytes
from vestige.core.types import InputSpec, count_parameters, predict
from vestige.errors import DataError, RecipeError, ShapeError
from vestige.models.factory import build_model
from vestige.models.layer_choice import choose_layers
from vestige.models.mel import LogMel
from vestige.models.speech import SpeechRecognizer, spoken
from vestige.models.spoken_tokens import OwnTokens
from vestige.teachers.files import load_weights

transformers = pytest.importorskip("transformers")
SPEC = InputSpec.audio(0.2, 8000)
TEXTS = ["one two", "three", "two two one", "one"]
ROWS = to_bytes(TEXTS, 32)


@pytest.fixture
def waveforms() -> Tensor:
    return torch.randn(4, *SPEC.shape, generator=torch.Generator().manual_seed(3)) * 0.1


def recognizer(**args: object) -> SpeechRecognizer:
    torch.manual_seed(0)
    small = {"width": 8, "mel_bins": 8, "max_tokens": 6, "ffn": 16, "hop_samples": 160}
    made = build_model("whisper", SPEC, 10, **{**small, **args})
    assert isinstance(made, SpeechRecognizer)
    made.learn_vocabulary(ROWS)
    return made


@pytest.mark.parametrize("bins", [80, 128])
def test_features_are_those_of_whisper(bins):
    extractor = transformers.WhisperFeatureExtractor(feature_size=bins)
    sound = np.random.RandomState(0).randn(16_000 * 3).astype("float32") * 0.1
    expected = extractor(sound, sampling_rate=16_000, return_tensors="pt").input_features
    found = LogMel(16_000, 480_000, mel_bins=bins)(torch.from_numpy(sound)[None])
    assert found.shape == expected.shape
    # Float32 against float64 in the power spectrum.
    assert torch.allclose(found, expected, atol=1e-4)


def test_silence_and_long_recordings():
    front = LogMel(8000, 1600, mel_bins=8, hop_samples=160, n_fft=256)
    assert torch.isfinite(front(torch.zeros(2, 1600))).all()
    with pytest.raises(ShapeError, match="1600"):
        front(torch.zeros(2, 1601))


def test_tokens_come_back_as_the_text():
    tokens = OwnTokens.learned(TEXTS, "words", 10)
    assert [tokens.decode(tokens.encode(text)) for text in TEXTS] == TEXTS
    letters = OwnTokens.learned(TEXTS, "characters", 30)
    assert [letters.decode(letters.encode(text)) for text in TEXTS] == TEXTS
    assert tokens.decode(tokens.encode("one nine two")) == "one two"


def test_where_there_is_little_room_frequent_words_stay():
    assert OwnTokens.learned(["a a b", "a c", "b"], "words", 6).units == ("a", "b")


def test_scores_of_one_pass_are_those_of_asking_again(waveforms):
    network = recognizer().eval()
    heard = network.transcribe(waveforms, batch_size=3)
    logs = network(waveforms, decoder_input_ids=heard.tokens).logits.log_softmax(-1)[:, :-1]
    counted = spoken(heard.tokens, 1, network.end)
    log_probs = logs.gather(2, heard.tokens[:, 1:, None])[..., 0] * counted
    entropies = torch.special.entr(logs.exp()).sum(-1) * counted
    # The decoder's cache sums in another order.
    assert torch.allclose(log_probs, heard.log_probs[:, 1:], atol=1e-4)
    assert torch.allclose(entropies, heard.entropies[:, 1:], atol=1e-4)
    assert heard.written.tolist() == (counted.sum(1)).tolist()
    assert bool((heard.entropies <= math.log(10) + 1e-5).all())


def test_a_transcript_is_greedy_and_does_not_depend_on_the_batch(waveforms):
    network = recognizer()
    whole = network.transcribe(waveforms)
    single = network.transcribe(waveforms, batch_size=1)
    assert whole.texts == single.texts
    assert torch.equal(whole.tokens, single.tokens)
    assert network.training


def test_what_stands_behind_the_end_does_not_count():
    tokens = torch.tensor([[1, 5, 2, 2, 2], [1, 5, 6, 2, 0], [1, 2, 0, 0, 0]])
    assert spoken(tokens, 1, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
    # A prompt of three tokens, one of which is the end by its number.
    assert spoken(torch.tensor([[1, 2, 7, 5, 2]]), 3, 2).int().tolist() == [[0, 0, 1, 1]]


def test_the_loss_falls_and_the_text_is_learned():
    time = torch.arange(SPEC.shape[0]) / SPEC.sample_rate_hz
    tones = torch.stack(
        [torch.sin(2 * torch.pi * hertz * time) for hertz in (300, 700, 1500, 3000)]
    )
    network = recognizer(width=32, ffn=64, mel_bins=20)
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    for _ in range(100):
        loss = network.training_loss(tones, ROWS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    assert network.transcribe(tones).texts == TEXTS


def test_a_text_that_is_too_long_is_named(waveforms):
    with pytest.raises(DataError, match="max_tokens"):
        recognizer().training_loss(waveforms[:1], to_bytes(["one " * 9], 64))


def test_a_network_without_tokens_says_so(waveforms):
    network = build_model("whisper", SPEC, 10, width=8, mel_bins=8, max_tokens=6)
    with pytest.raises(DataError, match="learn_vocabulary"):
        network.transcribe(waveforms)


def test_weights_bring_the_tokens_along(waveforms):
    network = recognizer()
    fresh = build_model(
        "whisper", SPEC, 10, width=8, mel_bins=8, max_tokens=6, ffn=16, hop_samples=160
    )
    load_weights(fresh, network.state_dict(), where="here")
    assert fresh.transcribe(waveforms).texts == network.transcribe(waveforms).texts
    assert functional(network, {})(waveforms).logits.shape == (4, 1, 10)


def test_a_student_of_all_layers_is_its_teacher(waveforms):
    teacher = recognizer(encoder_layers=3, decoder_layers=2).eval()
    student = teacher.with_layers().eval()
    tokens = teacher.tokens_of(TEXTS)
    inputs = {"waveforms": waveforms, "decoder_input_ids": tokens}
    assert torch.equal(predict(student, inputs).logits, predict(teacher, inputs).logits)
    student.network.proj_out.weight.data.zero_()
    assert bool(teacher.network.proj_out.weight.any())


def test_layers_are_copied_as_they_were_chosen(waveforms):
    teacher = recognizer(encoder_layers=4, decoder_layers=4)
    student = teacher.with_layers(encoder_layers=2, decoder_layers=3)
    assert choose_layers(4, 2) == (0, 3)
    for side, layers in (("encoder", (0, 3)), ("decoder", choose_layers(4, 3))):
        theirs = getattr(teacher.network.model, side).layers
        ours = getattr(student.network.model, side).layers
        assert len(ours) == len(layers)
        for own, index in zip(ours, layers, strict=True):
            expected = theirs[index].state_dict()
            assert all(torch.equal(v, expected[k]) for k, v in own.state_dict().items())
    assert student.training
    assert all(one.requires_grad for one in student.parameters())
    card = student.network_card()
    again = build_model(card["model"], SPEC, 10, **card["args"])
    assert count_parameters(again) == count_parameters(student)
    load_weights(again, student.state_dict(), where="here")
    # A cache is found by a layer's place: the two would differ if it were the teacher's.
    assert again.transcribe(waveforms).texts == student.transcribe(waveforms).texts


def test_a_deeper_student_is_refused():
    with pytest.raises(RecipeError, match="layers"):
        recognizer().with_layers(encoder_layers=3)


def test_a_copy_writes_the_same(waveforms):
    network = recognizer()
    network.transcribe(waveforms)
    assert copy.deepcopy(network).transcribe(waveforms).texts == network.transcribe(waveforms).texts
