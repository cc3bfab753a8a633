import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vestige.core.types import InputSpec, predict
from vestige.errors import MissingExtraError, TeacherError
from vestige.teachers.hub import input_spec_of
from vestige.teachers.loading import fingerprint, load_teacher, open_teacher

PROCESSOR = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
    "size": {"height": 16, "width": 16},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer of a few hundred weights, as its users save it."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [text]")
    folder = tmp_path_factory.mktemp("hub") / "vit"
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
        id2label={0: "cat", 1: "dog", 2: "eel"},
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that a machine with network fails as fast as one without.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_folder_says_everything_itself(saved: Path) -> None:
    opened = open_teacher(f"hf:{saved}")
    assert opened.spec == InputSpec.image(3, 16, 16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    assert (opened.num_classes, opened.classes) == (3, ("cat", "dog", "eel"))
    assert not any(module.training for module in opened.module.modules())
    assert predict(opened.module, torch.zeros(2, 3, 16, 16)).logits.shape == (2, 3)
    weights = load_file(saved / "model.safetensors")
    assert torch.equal(
        opened.module.state_dict()["classifier.weight"], weights["classifier.weight"]
    )


def test_weights_from_another_file(saved: Path, tmp_path: Path) -> None:
    weights = {name: value + 1 for name, value in load_file(saved / "model.safetensors").items()}
    save_file(weights, tmp_path / "mine.safetensors")
    mine = load_teacher({"hf": str(saved), "weights": str(tmp_path / "mine.safetensors")})
    name = "classifier.bias"
    assert torch.equal(mine.state_dict()[name], weights[name])
    assert fingerprint(mine) != fingerprint(load_teacher(f"hf:{saved}"))
    # Names as the network has them are understood, too; transformers saves older ones.
    assert set(mine.state_dict()) != set(weights)
    save_file(mine.state_dict(), tmp_path / "own.safetensors")
    again = load_teacher({"hf": str(saved), "weights": str(tmp_path / "own.safetensors")})
    assert fingerprint(again) == fingerprint(mine)
    del weights[name]
    save_file(weights, tmp_path / "cut.safetensors")
    with pytest.raises(TeacherError, match=r"cut\.safetensors that do not fit"):
        load_teacher({"hf": str(saved), "weights": str(tmp_path / "cut.safetensors")})


def test_pickled_weights_are_not_read(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    torch.save(load_file(saved / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(TeacherError, match=r"expected config\.json and model\.safetensors"):
        load_teacher(f"hf:{tmp_path}")


def test_a_backbone_without_a_trained_head_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    weights = load_file(saved / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "classifier" not in name},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(TeacherError, match=r"without weights for classifier\.bias"):
        load_teacher(f"hf:{tmp_path}")


def test_what_is_no_classifier_is_told(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra [text]")
    (tmp_path / "config.json").write_text('{"model_type": "encodec"}')
    with pytest.raises(TeacherError, match=r"type 'encodec', .* no classifier of images or texts"):
        load_teacher(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:/no/such/folder", "there is no such folder"),
        ("hf:nobody/nothing-at-all", r"cannot be loaded .* download the folder elsewhere"),
        ({"hf": "a/b", "args": {"trust_remote_code": True}}, "no foreign code is run"),
        ({"hf": "a/b", "args": {"use_safetensors": False}}, "leave them out"),
    ],
)
def test_what_cannot_be_had_is_told(spec: object, message: str, offline: None) -> None:
    pytest.importorskip("transformers", reason="needs the extra [text]")
    with pytest.raises(TeacherError, match=message):
        load_teacher(spec)


def test_what_is_asked_must_fit(saved: Path) -> None:
    with pytest.raises(TeacherError, match=r"num_classes 4 .* expected 3"):
        open_teacher(f"hf:{saved}", num_classes=4)
    with pytest.raises(TeacherError, match="3 channels"):
        open_teacher(f"hf:{saved}", input_spec=InputSpec.image(1, 16, 16))


def test_without_transformers_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vestige.models.huggingface.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'vestige\[text\]'"):
        load_teacher("hf:a/b")
    monkeypatch.setattr("vestige.teachers.vision.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'vestige\[vision\]'"):
        load_teacher("timm:resnet18")
    with pytest.raises(MissingExtraError, match="'smp:' network, but segmentation_models_pytorch"):
        load_teacher("smp:Unet/resnet18")


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("factor", [1 / 255, 1 / 127.5])
@pytest.mark.parametrize("normalized", [True, False])
def test_the_spec_does_what_the_processor_does(
    rescaled: bool, factor: float, normalized: bool
) -> None:
    given = {
        **PROCESSOR,
        "do_rescale": rescaled,
        "rescale_factor": factor,
        "do_normalize": normalized,
    }
    pixels = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    expected = pixels * factor if rescaled else pixels
    if normalized:
        mean, std = (torch.tensor(given[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
        expected = (expected - mean) / std
    spec = input_spec_of({"num_channels": 3}, given)
    assert spec is not None
    torch.testing.assert_close(spec.normalize(pixels / 255), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "processor", "shape"),
    [
        ({}, {"size": 20}, (3, 20, 20)),
        ({}, {"size": {"shortest_edge": 20}}, (3, 20, 20)),
        ({}, {"size": 20, "crop_size": {"height": 8, "width": 9}}, (3, 20, 20)),
        (
            {},
            {"size": 20, "do_center_crop": True, "crop_size": {"height": 8, "width": 9}},
            (3, 8, 9),
        ),
        ({"image_size": 24, "num_channels": 1}, {}, (1, 24, 24)),
    ],
)
def test_sizes_are_read_in_every_form(config, processor, shape) -> None:
    spec = input_spec_of(config, processor)
    assert spec is not None and (spec.shape, spec.mean) == (shape, ())


def test_no_size_is_no_spec() -> None:
    assert input_spec_of({}, {}) is None
