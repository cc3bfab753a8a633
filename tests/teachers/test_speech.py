"""A folder as transformers saves it opens as a teacher that writes what `generate` writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vestige.core.types import InputSpec, predict
from vestige.errors import TeacherError
from vestige.models.factory import build_model
from vestige.models.speech import SpeechRecognizer
from vestige.tasks.speech import Speech
from vestige.teachers.files import load_weights
from vestige.teachers.loading import open_teacher

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
WORDS = ["<|endoftext|>", "<|sot|>", "<|en|>", "<|ar|>", "<|transcribe|>", "<|notime|>"]
TEXT = ["one", "two", "three", "four", "five", "six"]


def save(folder: Path, **generation: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=12, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=16,
        max_source_positions=50, max_target_positions=12, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    network = transformers.WhisperForConditionalGeneration(config).eval()
    network.proj_out.weight.data.mul_(40)
    network.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=1, eos_token_id=0, pad_token_id=0, bos_token_id=0
    )
    network.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(
        feature_size=16, sampling_rate=16_000, hop_length=160, chunk_length=1, n_fft=400
    ).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate([*WORDS, *TEXT])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="one"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(WORDS)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=WORDS[0], pad_token=WORDS[0]
    ).save_pretrained(folder)
    path = folder / "generation_config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, **generation}))
    return network


MANY = {
    "lang_to_id": {"<|en|>": 2, "<|ar|>": 3},
    "task_to_id": {"transcribe": 4},
    "no_timestamps_token_id": 5,
    "suppress_tokens": [2, 3, 4, 5, 1],
    "begin_suppress_tokens": [0],
}


@pytest.fixture
def waveforms() -> Tensor:
    return torch.randn(3, 16_000, generator=torch.Generator().manual_seed(2)) * 0.1


def test_it_writes_what_generate_writes(tmp_path, waveforms):
    network = save(tmp_path, **MANY)
    opened = open_teacher({"hf": str(tmp_path), "args": {"language": "ar"}})
    module = opened.module
    assert isinstance(module, SpeechRecognizer)
    assert opened.spec == InputSpec.audio(1.0, 16_000)
    assert (opened.num_classes, opened.task) == (12, "speech")
    assert module.prompt == (1, 3, 4, 5)
    Speech(opened.spec, 12).check(module)
    heard = module.transcribe(waveforms)
    features = module.front(waveforms)
    expected = torch.tensor([[1, 3, 4, 5]] * 3)
    with torch.no_grad():
        for _ in range(8):
            logits = network(input_features=features, decoder_input_ids=expected).logits[:, -1]
            logits[:, [1, 2, 3, 4, 5]] = -torch.inf
            if expected.shape[1] == 4:
                logits[:, 0] = -torch.inf
            ended = (expected[:, 4:] == 0).any(1)
            chosen = logits.argmax(1).masked_fill(ended, 0)
            expected = torch.cat([expected, chosen[:, None]], 1)
    assert torch.equal(heard.tokens, expected)
    words = [[*WORDS, *TEXT][token] for token in heard.tokens[0, 4:].tolist() if token]
    assert heard.texts[0] == " ".join(words)


def test_its_features_and_logits_are_those_of_transformers(tmp_path, waveforms):
    network = save(tmp_path)
    module = open_teacher(f"hf:{tmp_path}").module
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(tmp_path)
    features = extractor(
        [one.numpy() for one in waveforms], sampling_rate=16_000, return_tensors="pt"
    ).input_features
    tokens = torch.tensor([[1, 7, 8]] * 3)
    with torch.no_grad():
        expected = network(input_features=features, decoder_input_ids=tokens).logits
        inputs = {"waveforms": waveforms, "decoder_input_ids": tokens}
        found = predict(module, inputs).logits
    # Output weights are 40 times those of a fresh network, and so are the differences.
    assert torch.allclose(found, expected, atol=5e-3)
    assert module.prompt == (1,)


def test_a_student_of_it_is_loaded_again_from_its_card(tmp_path, waveforms):
    save(tmp_path, **MANY)
    teacher = open_teacher(
        {"hf": str(tmp_path), "args": {"language": "en", "max_tokens": 8}}
    ).module
    student = teacher.with_layers(encoder_layers=1, decoder_layers=1)
    card = json.loads(json.dumps(student.network_card()))
    again = build_model(card["model"], InputSpec.audio(1.0, 16_000), 12, **card["args"])
    load_weights(again, student.state_dict(), where="here")
    heard = again.transcribe(waveforms)
    assert heard.texts == student.transcribe(waveforms).texts
    assert heard.tokens.shape == (3, 8)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({}, "language None"),
        ({"language": "xx"}, "ar, en"),
        ({"language": "en", "task": "sing"}, "sing"),
    ],
)
def test_a_language_must_be_one_that_it_knows(tmp_path, args, told):
    save(tmp_path, **MANY)
    with pytest.raises(TeacherError, match=told):
        open_teacher({"hf": str(tmp_path), "args": args})


def test_a_network_of_one_language_takes_none(tmp_path):
    save(tmp_path)
    with pytest.raises(TeacherError, match="one language"):
        open_teacher({"hf": str(tmp_path), "args": {"language": "en"}})


@pytest.mark.parametrize(
    "file", ["preprocessor_config.json", "tokenizer.json", "model.safetensors"]
)
def test_a_folder_without_a_file_is_refused(tmp_path, file):
    save(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(TeacherError, match="expected"):
        open_teacher(f"hf:{tmp_path}")


def test_a_longer_window_than_its_own_is_refused(tmp_path):
    save(tmp_path)
    with pytest.raises(TeacherError, match="16000 at 16000 Hz"):
        open_teacher({"hf": str(tmp_path)}, input_spec=InputSpec.audio(2.0, 16_000))
