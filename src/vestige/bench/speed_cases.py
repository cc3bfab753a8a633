"""What speed benchmarks hold against each other: our way and a plain loop of the same calls."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vestige.bench.speed_case import SpeedCase
from vestige.bench.speed_writing import writing
from vestige.core.seeding import seeded
from vestige.core.texts import to_bytes
from vestige.core.types import InputSpec
from vestige.methods.asdfd import ASDFD, ASDFDConfig
from vestige.models.text import TextClassifier, bert
from vestige.sources.targets import even_targets
from vestige.tasks.text import Text
from vestige.teachers.white_box import WhiteBoxTeacher
from vestige.training.context import RunContext


def crafting() -> SpeedCase:
    """Texts crafted for a student: 5 steps of guessing and 2 of the adversary, 3 layers of 64.

    "plain" is the loop as one writes it with transformers: a leaf of embeddings, torch's Adam,
    `loss.backward()`, networks as `from_pretrained` gives them, whose weights get gradients that
    nobody uses. "plain, frozen" has `requires_grad_(False)` on both networks.
    """
    batch, length, width, layers = 32, 32, 64, 3
    with seeded(0, "speed"):
        teacher = bert(4, layers=layers, width=width, heads=2, vocabulary=4000, tokens=length)
        teacher.learn_vocabulary(_words())
        student = teacher.with_layers(layers=2)
    cfg = ASDFDConfig(batch_size=batch, length=length, confidence=1.0, longest_norm=1.0)
    task = Text(InputSpec.text(256), 4)
    open_teacher, open_student = _unfrozen(teacher), _unfrozen(student)
    method = ASDFD(cfg, task, [WhiteBoxTeacher(teacher)], student, {})
    ctx = RunContext(
        seed=0,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda params: None,
        on_loop=lambda name, n: 0,
        on_round=lambda: True,
    )

    def ours() -> None:
        for _ in method.craft(ctx):
            pass

    frozen = [_unfrozen(one).requires_grad_(False) for one in (teacher, student)]
    return SpeedCase(
        batch,
        "texts",
        {
            "vestige": ours,
            "plain": lambda: _plain_crafting(method, open_teacher, open_student),
            "plain, frozen": lambda: _plain_crafting(method, *frozen),
        },
        {"batch": batch, "length": length, "width": width, "layers": [layers, 2]},
    )


def _plain_crafting(method: ASDFD, teacher: nn.Module, student: nn.Module) -> Tensor:
    """The same batch by hand."""
    cfg, prior = method.cfg, method.prior
    rng = torch.Generator().manual_seed(0)
    start = prior.draw(cfg.batch_size, rng)
    targets = even_targets(cfg.batch_size, method.num_classes, rng)
    words = start.words.clone().requires_grad_()
    pinned = start.free[..., None]

    def pin(values: Tensor) -> Tensor:
        return torch.where(pinned, values, start.words)

    optimizer = torch.optim.Adam([words], cfg.guess_lr * prior.std)
    for _ in range(cfg.guess_steps):
        optimizer.zero_grad()
        answer = teacher(inputs_embeds=pin(words), attention_mask=start.mask).logits
        functional.cross_entropy(answer, targets).backward()
        optimizer.step()
    masked = prior.choose_masked(start, 0.0, rng)
    head: nn.Linear = method.head
    for _ in range(cfg.difficulty_steps):
        blanked = torch.where(masked[..., None], prior.table[prior.blank], pin(words))
        hidden = student(
            inputs_embeds=blanked, attention_mask=start.mask, output_hidden_states=True
        ).hidden_states[-1]
        wrong = (head(hidden) - pin(words)).square().sum(2)[masked].mean()
        # As one writes it: every weight that takes a gradient gets one.
        optimizer.zero_grad()
        wrong.backward()
        grad: Any = words.grad
        with torch.no_grad():
            length = grad.norm(dim=2, keepdim=True).clamp_min(1e-8)
            words += cfg.difficulty_lr * method.scale * grad / length
    return pin(words).detach()


def _unfrozen(reader: TextClassifier) -> nn.Module:
    """The network of transformers alone, as it is loaded."""
    network = type(reader.network)(reader.network.config)
    network.load_state_dict(reader.network.state_dict())
    return network.eval()


def _words() -> Tensor:
    rng = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (400, 12), generator=rng)
    return to_bytes(["".join(map(chr, row)) for row in letters.tolist()], 16)


CASES: Mapping[str, Callable[[], SpeedCase]] = {"crafting": crafting, "writing": writing}
