"""segmentation-models-pytorch; needs the extra [vision], which `make test-vision` installs."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vestige.core.types import InputSpec, count_parameters
from vestige.errors import RecipeError, TeacherError
from vestige.models.segmentation import MobileNetV2Features, deeplabv3_resnet50
from vestige.recipes.schema import ModelConfig
from vestige.recipes.student import build_student, network_card
from vestige.teachers.loading import fingerprint, load_teacher, open_teacher
from vestige.teachers.vision import import_timm, import_vision
from vestige.training.export.usage import in_torch

pytestmark = pytest.mark.optional
SPEC = InputSpec.image(3, 64, 64)
DRAWN = {"encoder_weights": None}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that a machine with network fails as fast as one without.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def made() -> nn.Module:
    """A network of the package with 5 classes and grey inputs."""
    smp = import_vision("segmentation_models_pytorch", "smp")
    torch.manual_seed(0)
    return smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=5)


def test_an_architecture_takes_classes_and_channels_of_what_is_asked(caplog) -> None:
    grey = InputSpec.image(1, 64, 96)
    with caplog.at_level(logging.WARNING):
        opened = open_teacher(
            {"smp": "DeepLabV3Plus", "args": {**DRAWN, "encoder_name": "resnet18"}},
            input_spec=grey,
            num_classes=7,
        )
    assert "as a teacher it knows nothing" in caplog.text
    assert (opened.spec, opened.num_classes, opened.trained_on) == (grey, 7, "")
    assert not any(module.training for module in opened.module.modules())
    with torch.no_grad():
        assert opened.module(torch.zeros(2, 1, 64, 96)).shape == (2, 7, 64, 96)


def test_weights_of_ones_own(made: nn.Module, tmp_path: Path, caplog) -> None:
    save_file(made.state_dict(), tmp_path / "mine.safetensors")
    own = {"smp": "Unet/resnet18", "weights": str(tmp_path / "mine.safetensors")}
    spec = InputSpec.image(1, 64, 64, mean=(0.5,), std=(0.25,))
    with caplog.at_level(logging.WARNING):
        opened = open_teacher(own, input_spec=spec, num_classes=5)
    assert caplog.text == ""
    assert fingerprint(opened.module) == fingerprint(made)
    with pytest.raises(TeacherError, match="do not fit Unet"):
        open_teacher(own, input_spec=SPEC, num_classes=5)  # colour


def test_what_save_pretrained_left(made: nn.Module, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path / "saved")
    opened = open_teacher(f"smp:{tmp_path / 'saved'}")
    assert fingerprint(opened.module) == fingerprint(made)
    assert (opened.spec, opened.num_classes, opened.trained_on) == (None, 5, "")
    with pytest.raises(TeacherError, match=r"num_classes 4 .* expected 5"):
        open_teacher(f"smp:{tmp_path / 'saved'}", num_classes=4)
    with pytest.raises(TeacherError, match="1 channels"):
        open_teacher(f"smp:{tmp_path / 'saved'}", input_spec=SPEC)


def test_a_saved_network_does_not_ask_for_the_weights_that_its_encoder_started_from(
    made: nn.Module, tmp_path: Path
) -> None:
    made.config["encoder_weights"] = "imagenet"
    made.save_pretrained(tmp_path / "saved")
    assert fingerprint(load_teacher(f"smp:{tmp_path / 'saved'}")) == fingerprint(made)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("smp:Unet/resnet18", r"without weights, expected a trained network: .* weights: FILE"),
        ("smp:nobody/nothing-at-all", r"cannot be loaded .* or one of DPT, DeepLabV3, .*/ENCODER"),
        ("smp:Unett", r"expected one of DPT, .* or ORG/NAME on the hub; correct the name"),
        ({"smp": "Unet/resnet1O", "args": DRAWN}, "Wrong encoder name `resnet1O`"),
        ({"smp": "Unet", "args": {**DRAWN, "width": 3}}, r"\['width'\] .* some of encoder_name, "),
        ({"smp": "Unet", "args": {"encoder_weights": "nil"}}, "Wrong pretrained weights `nil`"),
        ({"smp": "Unet", "args": {"aux_params": {"classes": 2}}}, "leave them out"),
        ({"smp": "Unet", "args": {"activation": "softmax"}}, "leave them out"),
        ({"smp": "Unet", "args": {**DRAWN, "classes": 1}}, "with 1 class, expected at least 2"),
        ({"smp": "Unet", "args": {"encoder_weights": "imagenet"}}, "got no encoder weights"),
    ],
)
def test_mistakes(spec: object, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TeacherError, match=message):
        load_teacher(spec)


def test_a_size_that_the_network_does_not_take_is_told_at_once() -> None:
    odd = InputSpec.image(3, 48, 50)
    with pytest.raises(TeacherError, match=r"got images of 48x50 .* divisible by 32"):
        open_teacher({"smp": "FPN/resnet18", "args": DRAWN}, input_spec=odd, num_classes=3)
    free = open_teacher({"smp": "Unet/resnet18", "args": DRAWN}, input_spec=odd, num_classes=3)
    with torch.no_grad():
        assert free.module(torch.zeros(1, *odd.shape)).shape == (1, 3, 48, 50)


def test_a_student_by_name_and_again_from_its_card(tmp_path: Path) -> None:
    config = ModelConfig(name="smp:Unet/resnet18", args={"decoder_channels": [16, 16, 8, 8, 4]})
    student = build_student(config, SPEC, 5, seed=1, teacher=nn.Identity())
    assert student.training
    again = build_student(config, SPEC, 5, seed=1, teacher=nn.Identity())
    assert fingerprint(student) == fingerprint(again)
    assert fingerprint(student) != fingerprint(
        build_student(config, SPEC, 5, seed=2, teacher=nn.Identity())
    )
    card = {**network_card(config), "num_classes": 5, "weights": "student.safetensors"}
    assert card["smp"] == "Unet/resnet18"
    card["input"] = {"channels": 3, "height": 64, "width": 64}
    (tmp_path / "student.json").write_text(json.dumps(card))
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    assert fingerprint(load_teacher(tmp_path / "student.json")) == fingerprint(student)
    code = in_torch(card).replace('"model.', f'"{tmp_path}/student.')
    scope: dict[str, nn.Module] = {}
    exec(code, scope)
    assert fingerprint(scope["network"]) == fingerprint(student)
    with pytest.raises((TeacherError, RecipeError), match="expected one of DPT"):
        build_student(ModelConfig(name="smp:Unett"), SPEC, 5, seed=1, teacher=nn.Identity())


def test_a_recipe_names_both() -> None:
    from vestige.recipes.loading import load_recipe, validate

    small = load_recipe("dfad", preset="smoke").model_dump(mode="json")
    small["teacher"] = {"smp": "Unet/resnet18", "weights": "mine.safetensors"}
    small["student"] = {"name": "smp:Unet/mobilenet_v2", "args": {}}
    recipe = validate(small)
    assert recipe.student is not None and recipe.student.name == "smp:Unet/mobilenet_v2"


def test_our_deeplab_computes_what_torchvisions_does() -> None:
    import_timm()
    from torchvision.models import mobilenet_v2
    from torchvision.models.segmentation import deeplabv3_resnet50 as published

    torch.manual_seed(0)
    theirs = published(weights=None, weights_backbone=None, num_classes=21).eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.add_(torch.rand_like(buffer) * 0.1)
    ours = deeplabv3_resnet50().eval()
    assert count_parameters(ours) == count_parameters(theirs)
    # Layers are defined in the same order, only their names differ.
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    values = torch.randn(1, 3, 97, 75)
    with torch.no_grad():
        torch.testing.assert_close(ours(values), theirs(values)["out"], rtol=1e-4, atol=1e-6)
    features = mobilenet_v2(weights=None).eval().features[:-1]
    backbone = MobileNetV2Features(output_stride=32).eval()
    named = zip(backbone.state_dict(), features.state_dict().values(), strict=True)
    backbone.load_state_dict(dict(named))
    with torch.no_grad():
        torch.testing.assert_close(backbone(values), features(values), rtol=1e-4, atol=1e-12)
