"""timm as a teacher; needs the extra [vision], which `make test-vision` installs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vestige.core.types import InputSpec
from vestige.errors import TeacherError
from vestige.teachers.loading import fingerprint, load_teacher, open_teacher
from vestige.teachers.vision import import_timm

pytestmark = pytest.mark.optional
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RANDOM = {"pretrained": False}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that a machine with network fails as fast as one without.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_torchvision_can_be_imported_beside_this_torch() -> None:
    import_timm()
    import_timm()  # declares nothing twice
    import torchvision

    assert torchvision.transforms.functional.resize(torch.rand(1, 8, 8), [4, 4]).shape == (1, 4, 4)


def test_what_a_model_says_of_its_inputs_is_taken() -> None:
    opened = open_teacher({"timm": "resnet10t.c3_in1k", "args": RANDOM})
    timm = import_timm()
    config = timm.get_pretrained_cfg("resnet10t.c3_in1k")
    assert opened.spec == InputSpec.image(*config.input_size, mean=config.mean, std=config.std)
    assert opened.spec == InputSpec.image(3, 176, 176, mean=IMAGENET[0], std=IMAGENET[1])
    assert opened.num_classes == 1000
    assert not any(module.training for module in opened.module.modules())
    inception = open_teacher({"timm": "mobilenetv3_small_050", "args": RANDOM})
    assert inception.spec is not None and inception.spec.mean != ()


def test_grey_images_and_other_classes_and_sizes() -> None:
    args = {**RANDOM, "in_chans": 1, "num_classes": 7}
    opened = open_teacher({"timm": "resnet10t", "args": args})
    assert (opened.spec.shape[0], opened.num_classes) == (1, 7)
    assert opened.spec.mean == pytest.approx((sum(IMAGENET[0]) / 3,))
    assert opened.module(torch.zeros(2, 1, 64, 64)).shape == (2, 7)
    own = InputSpec.image(1, 32, 32)
    assert open_teacher({"timm": "resnet10t", "args": args}, input_spec=own).spec == own
    vit = {**RANDOM, "img_size": 64}
    assert open_teacher({"timm": "vit_tiny_patch16_224", "args": vit}).spec.shape == (3, 64, 64)


def test_weights_of_ones_own(tmp_path: Path) -> None:
    made = import_timm().create_model("resnet10t", num_classes=5, in_chans=1)
    save_file(made.state_dict(), tmp_path / "mine.safetensors")
    spec = InputSpec.image(1, 32, 32, mean=(0.5,), std=(0.25,))
    own = {"timm": "resnet10t", "weights": str(tmp_path / "mine.safetensors")}
    opened = open_teacher(own, input_spec=spec, num_classes=5)
    assert fingerprint(opened.module) == fingerprint(made)
    assert (opened.spec, opened.num_classes, opened.trained_on) == (spec, 5, "")
    with pytest.raises(TeacherError, match="do not fit ResNet"):
        open_teacher(own)  # 1000 classes, colour


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:resnet1O", r"'timm:resnet1O', expected a name of timm\.list_models\(\); near are"),
        ("timm:resnet10t", r"no pretrained weights .*weights: FILE\.safetensors"),
        ({"timm": "resnet10t", "args": {**RANDOM, "width": 3}}, "which timm does not take"),
        ({"timm": "resnet10t", "args": {"checkpoint_path": "x.pt"}}, "under 'weights'"),
        ({"timm": "resnet10t", "args": {**RANDOM, "num_classes": 0}}, "with 0 classes"),
    ],
)
def test_mistakes(spec: object, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TeacherError, match=message):
        load_teacher(spec)


def test_what_is_asked_must_fit() -> None:
    random = {"timm": "resnet10t", "args": RANDOM}
    with pytest.raises(TeacherError, match=r"num_classes 10 .* expected 1000"):
        open_teacher(random, num_classes=10)
    with pytest.raises(TeacherError, match="3 channels"):
        open_teacher(random, input_spec=InputSpec.image(1, 32, 32))


def test_a_recipe_may_leave_input_and_classes_out() -> None:
    from vestige.recipes.build import build
    from vestige.recipes.loading import load_recipe, validate

    small = load_recipe("dfad", preset="smoke").model_dump(mode="json")
    unsaid = {"data": None, "input": None, "num_classes": None, "arms": {}}
    unsaid |= {"headline": None, "baseline": None, "reference": None}
    teacher = {"timm": "resnet10t", "args": {**RANDOM, "num_classes": 12}}
    job = build(validate({**small, **unsaid, "teacher": teacher}))
    assert (job.task.num_classes, job.task.spec.shape) == (12, (3, 176, 176))
    assert job.facts.student_card["input"]["mean"] == list(IMAGENET[0])


def test_distilling_a_thousand_classes_for_one_round() -> None:
    import vestige

    opened = open_teacher({"timm": "resnet10t", "args": RANDOM})
    spec = InputSpec.image(3, 32, 32, mean=opened.spec.mean, std=opened.spec.std)
    student = import_timm().create_model("resnet10t", num_classes=1000)
    before = fingerprint(student)
    config = {"rounds": 1, "iterations": 2, "student_steps": 1, "batch_size": 8}
    report = vestige.distill(
        opened.module, student, method="dfad", spec=spec, num_classes=1000, config=config
    )
    assert report.summary["teacher"]["parameters"] == report.summary["student"]["parameters"]
    assert fingerprint(report.student) != before
    assert report.student(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)


def test_segmentation_models_work_beside_it() -> None:
    import_timm()
    args = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 4}
    teacher = load_teacher({"factory": "segmentation_models_pytorch:Unet", "args": args})
    assert isinstance(teacher, nn.Module)
    assert teacher(torch.zeros(2, 3, 32, 32)).shape == (2, 4, 32, 32)
