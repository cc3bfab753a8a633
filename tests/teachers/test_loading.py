import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vestige.core.types import InputSpec
from vestige.errors import TeacherError
from vestige.models.factory import build_model
from vestige.teachers import loading
from vestige.teachers.loading import (
    builtin_card,
    builtin_teachers,
    fingerprint,
    load_teacher,
    read_card,
)

SPEC = InputSpec.image(1, 16, 16)
SMALL = {"model": "convnet", "args": {"widths": [2, 3, 4]}}


def small() -> nn.Module:
    return build_model("convnet", SPEC, 5, widths=[2, 3, 4])


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of the user's own, outside of vestige."""
    (tmp_path / "user_nets.py").write_text(
        "from torch import nn\n"
        "def make(width=2): return nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5))\n"
        "def number(): return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "user_nets:make"
    sys.modules.pop("user_nets", None)


def test_builtin_teacher_is_what_its_card_says() -> None:
    assert "digits-convnet" in builtin_teachers()
    card = builtin_card("digits-convnet")
    teacher = load_teacher("builtin:digits-convnet")
    assert fingerprint(teacher) == card.weights_fingerprint
    assert card.input.spec() == InputSpec.image(1, 16, 16, mean=(0.3058,), std=(0.3193,))
    assert teacher(torch.randn(2, *card.input.spec().shape)).shape == (2, card.num_classes)
    assert not any(module.training for module in teacher.modules())


def test_builtin_teacher_is_not_bent_to_another_use() -> None:
    card = builtin_card("digits-convnet")
    load_teacher("builtin:digits-convnet", input_spec=card.input.spec(), num_classes=10)
    with pytest.raises(TeacherError, match=r"num_classes 7 .* expected 10"):
        load_teacher("builtin:digits-convnet", num_classes=7)
    with pytest.raises(TeacherError, match="input spec"):
        load_teacher("builtin:digits-convnet", input_spec=SPEC)


def test_unknown_names_list_what_there_is() -> None:
    with pytest.raises(TeacherError, match=r"'nothing', expected one of .*digits-convnet"):
        load_teacher("builtin:nothing")
    for name in ("tim:resnet50", "resnet50"):
        with pytest.raises(TeacherError, match="starts with builtin: or timm: or smp: or hf: or"):
            load_teacher(name)


def test_altered_builtin_weights_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = builtin_card("digits-convnet")
    weights = load_teacher("builtin:digits-convnet").state_dict()
    weights[next(iter(weights))].view(-1)[0] += 1e-6
    save_file(weights, tmp_path / "digits-convnet.safetensors")
    (tmp_path / "digits-convnet.json").write_text(card.model_dump_json())
    monkeypatch.setattr(loading, "WEIGHTS_FOLDER", tmp_path)
    with pytest.raises(TeacherError, match="the file was changed"):
        load_teacher("builtin:digits-convnet")


@pytest.mark.parametrize("content", [b"", b"{", b'{"name": "x"}'])
def test_what_is_no_card_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(TeacherError, match=r"x\.json"):
        read_card(tmp_path / "x.json")


SAVERS: dict[str, Callable[[nn.Module, Path], object]] = {
    "a.safetensors": lambda module, path: save_file(module.state_dict(), path),
    "a.pt": lambda module, path: torch.save(module.state_dict(), path),
    "a.pth": lambda module, path: torch.save({"state_dict": module.state_dict(), "e": 3}, path),
}


@pytest.mark.parametrize("name", SAVERS)
def test_weights_come_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    saved = small()
    SAVERS[name](saved, tmp_path / name)
    loaded = load_teacher(
        {**SMALL, "weights": str(tmp_path / name)}, input_spec=SPEC, num_classes=5
    )
    assert fingerprint(loaded) == fingerprint(saved) != fingerprint(small())
    assert not loaded.training


def test_model_needs_its_input_and_its_classes() -> None:
    with pytest.raises(TeacherError, match="without an input spec"):
        load_teacher(SMALL, num_classes=5)
    with pytest.raises(TeacherError, match="without num_classes"):
        load_teacher(SMALL, input_spec=SPEC)


def test_factory_of_the_user(tmp_path: Path, factory: str) -> None:
    saved = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    save_file(saved.state_dict(), tmp_path / "a.safetensors")
    teacher = load_teacher(
        {"factory": factory, "args": {"width": 4}, "weights": tmp_path / "a.safetensors"}
    )
    inputs = torch.randn(6, 3)
    assert torch.equal(teacher(inputs), saved.eval()(inputs))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"factory": "user_nets:make", "args": {"widht": 4}}, "unexpected keyword argument"),
        ({"factory": "user_nets:build"}, "no attribute 'build'"),
        ({"factory": "no_such_package:make"}, "No module named"),
        ({"factory": "user_nets"}, "package.module:callable"),
        ({"factory": "user_nets:number"}, "got int from factory"),
        ({"factory": "user_nets:make", "weigths": "a.pt"}, "did you mean 'weights'"),
        ({"factory": "user_nets:make", "model": "convnet"}, "either 'factory' or 'model'"),
        ({"args": {}}, "either 'factory' or 'model'"),
        ({"factory": "user_nets:make", "combine": "logits"}, "'factory' does not take 'combine'"),
        ({"ensemble": ["builtin:digits-convnet"], "args": {}}, "'ensemble' does not take 'args'"),
        ({"ensemble": "builtin:digits-convnet"}, "expected a list"),
        ({"factory": "user_nets:make", "input": {"chanels": 3}}, "expected channels, height"),
    ],
)
def test_mistakes_in_a_mapping(factory: str, spec: dict[str, object], expected: str) -> None:
    with pytest.raises(TeacherError, match=expected):
        load_teacher(spec)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def load_small(path: Path) -> nn.Module:
    return load_teacher({**SMALL, "weights": path}, input_spec=SPEC, num_classes=5)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({**small().state_dict(), "trap": Trap(sprung)}, tmp_path / "a.pt")
    torch.save(small(), tmp_path / "b.pt")  # a whole module is code as well
    for name in ("a.pt", "b.pt"):
        with pytest.raises(TeacherError, match=r"refused.*safetensors\.torch\.save_file"):
            load_small(tmp_path / name)
    assert not sprung.exists()


@pytest.mark.parametrize("name", SAVERS)
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    SAVERS[name](small(), path)
    whole = path.read_bytes()
    for damaged in (b"", b"hello", whole[:100], whole[:-50]):
        path.write_bytes(damaged)
        with pytest.raises(TeacherError, match=rf"{name}, which cannot be read"):
            load_small(path)


def test_what_is_no_weights_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="no file"):
        load_small(tmp_path / "missing.safetensors")
    with pytest.raises(TeacherError, match=r"expected \.safetensors, \.pt or \.pth"):
        load_small(tmp_path / "a.onnx")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(TeacherError, match="list content, expected a state dict"):
        load_small(tmp_path / "list.pt")


def test_weights_of_another_network_are_told_apart(tmp_path: Path) -> None:
    other = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(7)))
    save_file(other.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(TeacherError) as caught:
        load_small(tmp_path / "a.safetensors")
    message = str(caught.value)
    assert "7 unexpected: 0.weight, 1.weight, 2.weight, 3.weight, 4.weight, ..." in message
    assert f"{len(small().state_dict())} missing: " in message

    wide = build_model("convnet", SPEC, 6, widths=[2, 3, 4])
    save_file(wide.state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(TeacherError, match=r"weight \(6, 4\) instead of \(5, 4\)"):
        load_small(tmp_path / "b.safetensors")


def test_fingerprint_sees_names_shapes_dtypes_and_every_bit() -> None:
    def of(**tensors: torch.Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return fingerprint(module)

    zeros = torch.zeros(2, 3)
    tiny = zeros.clone()
    tiny[1, 2] = 1e-45
    prints = [
        of(a=zeros),
        of(b=zeros),
        of(a=zeros.view(3, 2)),
        of(a=zeros.view(torch.int32)),
        of(a=tiny),
        of(a=-zeros),
        of(a=zeros.bfloat16()),
    ]
    assert len(set(prints)) == len(prints)
    assert of(a=zeros, b=tiny) == of(b=tiny, a=zeros)
    assert of(a=torch.tensor(3)) == of(a=torch.tensor(3))
