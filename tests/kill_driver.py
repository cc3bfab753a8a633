"""One run of DFAD that may be killed at any moment: `python kill_driver.py FOLDER`.

Goes on where an earlier process stopped. Imports torch and what training needs, nothing for people
or for figures. Prints "ready" before the first step and, at the end, "done" and a digest of
everything that training decided.

Without an argument it reads requests from its input, "FOLDER" or "FOLDER fsync N" or
"FOLDER replace N", and forks a process of its own for each, so that torch is imported once for many
starts; it never trains itself. The latter forms kill the process at its N-th call of os.fsync or
os.replace, that is, in the middle of writing a file.
"""

import hashlib
import importlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from vestige.core import seeding
from vestige.core.types import InputSpec
from vestige.methods.dfad import DFAD, DFADConfig
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.tracking import Event
from vestige.training.trainer import Trainer
from vestige.training.trainer_config import TrainerConfig

SPEC = InputSpec.image(1, 8, 8)
CONFIG = DFADConfig(
    rounds=12,
    iterations=4,
    student_steps=3,
    batch_size=8,
    student_optimizer="adam",
    student_lr=2e-3,
    generator_width=4,
    latent_dim=8,
    schedule="cosine",
    bn_weight=0.5,
    replay=0.5,
    replay_size=32,
)


class Task:
    """What DFAD and the trainer ask of a task; the real one would import sets and metrics."""

    kind, metric, num_classes, spec = "classification", "accuracy", 3, SPEC


def network(width: int, dropout: float = 0.0) -> nn.Module:
    """A small classifier with BatchNorm and, for the student, dropout."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(4 * width, 3),
    )


def digest(trainer: Trainer) -> str:
    """Of networks, memory, optimizers, counts and every stream of randomness."""
    found = hashlib.sha256()

    def add(name: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{name}/{key}", value[key])
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                add(f"{name}/{index}", item)
        elif type(value).__module__ == "numpy":
            add(name, torch.tensor(value))
        else:
            found.update(f"{name}={value!r}".encode())

    for name, part in sorted(trainer.method.parts().items()):
        add(name, part.state_dict())
        if hasattr(part, "named_modules"):
            add(f"{name}/training", {n: m.training for n, m in part.named_modules()})
    add("context", trainer.ctx.state())
    add("globals", seeding.global_state())
    add("scores", trainer.watch.scores)
    return found.hexdigest()


def main(folder: Path) -> None:
    """Run to the end, or until somebody kills the process."""
    torch.set_num_threads(1)
    with seeding.seeded(0, "networks"):
        teacher, student = WhiteBoxTeacher(network(8)), network(4, dropout=0.3)
        method = DFAD(CONFIG, Task(), [teacher], student, {})

    def tell(event: Event) -> None:
        if event.kind == "start":
            print("ready", event.data["step"], flush=True)

    trainer = Trainer(
        method,
        Task(),
        teachers=[teacher],
        student=student,
        evaluate=lambda net: {"accuracy": net.eval()(torch.ones(2, 1, 8, 8)).mean().item()},
        out=folder,
        config=TrainerConfig(device="cpu", log_every=5),
        callbacks=[tell],
    )
    outcome = trainer.run(resume=True)
    assert outcome.steps == CONFIG.rounds * CONFIG.iterations * (CONFIG.student_steps + 1)
    print("done", json.dumps({"digest": digest(trainer), "steps": outcome.steps}), flush=True)
    heavy = {"typer", "rich", "sklearn", "torchmetrics", "matplotlib", "yaml"} & set(sys.modules)
    assert not heavy, heavy


def kill_inside(name: str, number: int) -> None:
    """Replace os.fsync or os.replace by one whose N-th call is the process's last."""
    real, calls = getattr(os, name), [0]

    def last(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(os, name, last)


def serve() -> None:
    """Fork a process for each request and say how it ended."""
    importlib.import_module("torch._dynamo")  # the first optimizer imports it
    pid = 0
    for line in sys.stdin:
        # Only now, so that whoever kills a process that has just ended cannot hit another one.
        if pid:
            os.waitpid(pid, 0)
        folder, *inside = line.split()
        pid = os.fork()
        if pid == 0:
            if inside:
                kill_inside(inside[0], int(inside[1]))
            main(Path(folder))
            os._exit(0)
        print("pid", pid, flush=True)
        how = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert how is not None
        code = how.si_status if how.si_code == os.CLD_EXITED else -how.si_status
        print("ended", code, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        serve()
