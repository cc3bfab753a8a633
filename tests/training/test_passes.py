"""What is recorded, what is timed, and that timing leaves networks as they are."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from vestige.errors import ContractError
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training import passes as passes_module
from vestige.training.passes import PassRecorder, PassTimer, split_pass, timed_networks

CPU = torch.device("cpu")
CLOCK = [0.0]


class Slow(nn.Module):
    """Passes of known length: 10 there, 40 back to the weight, 5 back to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.forwards = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.forwards += 1
        CLOCK[0] += 10
        return _Costing.apply(inputs, 5) * _Costing.apply(self.weight, 40)


class _Costing(torch.autograd.Function):
    """The identity; its backward takes `cost`."""

    @staticmethod
    def forward(ctx, value, cost):
        ctx.cost = cost
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        CLOCK[0] += ctx.cost
        return grad, None


def recorded(network: nn.Module, *batches: Tensor) -> PassRecorder:
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    with PassRecorder({"net": network}) as recorder:
        for batch in batches:
            loss = network(batch).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return recorder


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("student_forward", ("student", "forward")),
        ("student_backward_to_input", ("student", "backward_to_input")),
        ("my_net_backward", ("my_net", "backward")),
        ("pool/a_backward_step", ("pool/a_backward", "step")),
    ],
)
def test_names_of_passes(name: str, parts: tuple[str, str]) -> None:
    assert split_pass(name) == parts


@pytest.mark.parametrize("name", ["forward", "_forward", "student_forwards", "student"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ContractError, match="expected <network>_<pass>"):
        split_pass(name)


def test_networks_are_found_by_the_names_of_passes(
    tiny_teacher: nn.Module, tiny_student: nn.Module
) -> None:
    class Holder:
        def networks(self) -> dict[str, nn.Module]:
            return {"a": inner}

    inner, generator, teacher = nn.Linear(1, 1), nn.Linear(2, 2), WhiteBoxTeacher(tiny_teacher)
    parts = {"student": tiny_student, "generator": generator, "memory": object(), "many": Holder()}
    found = timed_networks(parts, [teacher], tiny_student)
    wanted = {"student": tiny_student, "teacher": teacher, "generator": generator, "many/a": inner}
    assert found == wanted


def test_each_pass_is_timed_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_module, "time", SimpleNamespace(perf_counter=lambda: CLOCK[0]))
    recorder = recorded(Slow(), torch.ones(3, 1))
    passes = {"net_forward": 4.0, "net_backward": 2.0, "net_backward_to_input": 1.0}
    timer = PassTimer(recorder, passes, CPU)
    for _ in range(3):
        timer.cycle()
    found = timer.take()
    assert found.seconds == dict(zip(passes, (10, 40, 5), strict=True))
    assert found.total(passes) == 4 * 10 + 2 * 40 + 5
    assert timer.take().seconds == {}


def test_a_cycle_holds_the_passes_in_the_proportions_of_a_round() -> None:
    network = Slow()
    recorder = recorded(network, torch.ones(3, 1))
    timer = PassTimer(
        recorder, {"net_forward": 60.0, "net_backward": 20.0, "net_backward_to_input": 10.0}, CPU
    )
    network.forwards = 0
    timer.cycle()
    # 30 forwards without graph, 20 and 10 with one.
    assert network.forwards == 3 + 2 + 1
    network.forwards = 0
    timer.once()
    assert network.forwards == 3


def test_weights_gradients_and_optimizers_stay(tiny_student: nn.Module) -> None:
    recorder = recorded(tiny_student, torch.randn(4, 1, 8, 8))
    (optimizer,) = recorder.optimizers["net"]
    before = [p.detach().clone() for p in tiny_student.parameters()]
    grads = [p.grad.clone() for p in tiny_student.parameters()]
    moments = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    timer = PassTimer(recorder, {"net_forward": 2, "net_backward": 2, "net_step": 1}, CPU)
    timer.cycle()
    assert set(timer.take().seconds) == {"net_forward", "net_backward", "net_step"}
    for was, now in zip(before, tiny_student.parameters(), strict=True):
        assert torch.equal(was, now)
    for was, now in zip(grads, tiny_student.parameters(), strict=True):
        assert torch.equal(was, now.grad)
    for was, now in zip(moments, optimizer.state.values(), strict=True):
        assert torch.equal(was, now["momentum_buffer"])
    assert not tiny_student._forward_pre_hooks


def test_calls_count_by_shape_and_only_if_a_step_follows(tiny_student: nn.Module) -> None:
    small, large = torch.randn(2, 1, 8, 8), torch.randn(6, 1, 8, 8)
    optimizer = torch.optim.SGD(tiny_student.parameters(), 0.1)
    with PassRecorder({"net": tiny_student}) as recorder:
        for batch in (small, large, large):
            tiny_student(batch).sum().backward()
            optimizer.step()
        tiny_student.eval()
        tiny_student(torch.randn(50, 1, 8, 8))  # an evaluation
    tiny_student.train()
    assert [(call.rows, call.count) for call in recorder.calls["net"]] == [(2, 1), (6, 2)]
    rows: list[int] = []
    tiny_student.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    timer = PassTimer(recorder, {"net_forward": 6.0, "net_step": 1.0}, CPU)
    timer.cycle()
    assert sorted(rows) == [2, 2, 6, 6, 6, 6]


def test_mode_and_precision_are_those_of_the_recorded_call(tiny_student: nn.Module) -> None:
    optimizer = torch.optim.SGD(tiny_student.parameters(), 0.1)
    tiny_student.eval()
    with PassRecorder({"net": tiny_student}) as recorder:
        with torch.autocast("cpu", torch.bfloat16):
            tiny_student(torch.randn(2, 1, 8, 8)).float().sum().backward()
        optimizer.step()
    tiny_student.train()
    seen: list[tuple[bool, torch.dtype]] = []
    tiny_student.register_forward_hook(
        lambda module, args, out: seen.append((module.training, out.dtype))
    )
    PassTimer(recorder, {"net_forward": 1.0}, CPU).cycle()
    assert seen == [(False, torch.bfloat16)]
    assert tiny_student.training


def test_what_was_not_seen_is_unknown(tiny_student: nn.Module) -> None:
    recorder = PassRecorder({"net": tiny_student})
    passes = {"net_forward": 1.0, "other_step": 1.0}
    assert not recorder.complete(passes)
    timer = PassTimer(recorder, passes, CPU)
    timer.cycle()
    assert timer.take().unknown == ["net_forward", "other_step"]


def test_an_observed_pass_takes_statistics_and_goes_back_to_the_input() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)
    ).eval()
    recorder = PassRecorder({"net": net})
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with recorder:
        net(torch.randn(4, 1, 8, 8)).sum().backward()
        optimizer.step()
    hooks = len(net[1]._forward_pre_hooks)
    timer = PassTimer(recorder, {"net_observed": 2.0}, CPU)
    timer.cycle()
    found = timer.take()
    assert found.unknown == []
    assert found.seconds["net_observed"] > 0
    assert len(net[1]._forward_pre_hooks) == hooks
