"""Interfaces between the rooms; nothing here is inherited from, everything is structural."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.optim import Optimizer

from vestige.core.schedules import Schedule
from vestige.core.types import (
    Access,
    Batch,
    Inputs,
    InputSpec,
    Loss,
    Prediction,
    Requires,
    Result,
    Role,
    Step,
)

LossFn = Callable[[Any, Batch], Loss]
OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state belongs into a checkpoint."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> Any: ...


@runtime_checkable
class HoldsNetworks(Protocol):
    """A part that is no module itself but holds some: clients, an ensemble.

    They are moved to the run's device and their training flags are kept; their weights belong into
    the part's own `state_dict`.
    """

    def networks(self) -> Mapping[str, nn.Module]: ...


@runtime_checkable
class Sharded(Protocol):
    """A part that only ever grows: shard i never changes once it exists.

    A checkpoint writes each shard once and afterwards holds only the list of them.
    """

    def shard_count(self) -> int: ...

    def shard(self, index: int) -> Mapping[str, Tensor]: ...

    def load_shards(self, shards: Iterable[Mapping[str, Tensor]], /) -> None: ...


@runtime_checkable
class LearnsVocabulary(Protocol):
    """A network with a tokenizer of its own that has to see texts before its first step."""

    def learn_vocabulary(self, texts: Tensor) -> None:
        """Choose the tokens by `texts` (N, L), rows of bytes as in `core.texts`."""
        ...


@runtime_checkable
class SizedByState(Protocol):
    """A network some of whose buffers take the size that they have in a state: a tokenizer.

    Its `load_state_dict` takes them as they come, see `models.sizes`.
    """

    sized_by_state: tuple[str, ...]


@runtime_checkable
class OwnLoss(Protocol):
    """A network whose answers are no single logits: it knows how it is trained on examples."""

    def training_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Mean loss () of a batch in nats, with gradient, for the training of a teacher.

        Args:
            inputs: (B, ...), as the task's examples have them.
            labels: (B, ...), likewise: class numbers, or texts as rows of bytes.
        """
        ...


@runtime_checkable
class SavesTransformers(Protocol):
    """A network that transformers can open by itself once it is saved its way."""

    def save_transformers(self, folder: Path, classes: Sequence[str] = ()) -> None:
        """Write configuration, weights and tokenizer into `folder`, with the names of classes."""
        ...


@runtime_checkable
class MakesStudents(Protocol):
    """A network that a smaller one of its own kind can be made of, with some of its layers."""

    def with_layers(self, **args: Any) -> nn.Module:
        """A student that starts from this network's weights, a module of its own.

        Where other weights are drawn they come from torch's global random state. The student has
        `network_card()`, from which it can be built again.

        Raises:
            RecipeError: this network cannot be made smaller like that.
        """
        ...


@runtime_checkable
class NamesClasses(Protocol):
    """A teacher whose classes are words of its own, which are matched with those of a data set."""

    def name_classes(self, names: Sequence[str]) -> None:
        """Call and order its classes as `names`.

        Raises:
            RecipeError: they do not fit its own.
        """
        ...


@runtime_checkable
class MakesRecords(Protocol):
    """A method that leaves a data set: synthetic.jsonl with its card."""

    def records(self) -> Iterable[Mapping[str, Any]]:
        """One JSON object for each text: C, X, Y and what else is known of it."""
        ...

    def record_card(self) -> Mapping[str, Any]:
        """Plain values: prompts, decoding, and counts of what was asked for, kept and dropped."""
        ...


class Teacher(Protocol):
    """A frozen network, as far as its access level shows it."""

    access: Access

    def __call__(self, *args: Any, **kwargs: Any) -> Prediction: ...


@runtime_checkable
class KeepsAnswers(Protocol):
    """A teacher whose answers cost: a resumed run must not ask again for what it repeats."""

    def keep_answers(self, path: Path, *, resume: bool) -> None:
        """Keep answers in a file at `path` from now on; without `resume` it is emptied first."""
        ...

    def checkpointed(self) -> None:
        """A checkpoint was written."""
        ...


class Source(Protocol):
    """Where inputs come from that are not made by the method itself.

    Attributes:
        origin: "noise", "generator", "synthetic", "foreign", "unlabelled", "client-private" or
            "real".
        name: what is shown to the user and written into the run record.
        paths: files or folders that it may open while the method runs.
    """

    origin: str
    name: str
    paths: tuple[Path, ...]

    def draw(self, count: int, rng: torch.Generator) -> Inputs:
        """`count` inputs in the teacher's normalised space, (count, ...), no gradient."""
        ...


class DataSet(Protocol):
    """One split of real data for inputs of one kind, opened by `recipes` alone.

    The module `data/<kind>.py` holds the one for inputs of that `InputSpec.kind`.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    fingerprint: str

    @classmethod
    def open(cls, name: str, split: str) -> "DataSet":
        """Read the split "train", "select" or "test" of a set by name or folder."""
        ...

    def __len__(self) -> int: ...

    def inputs(self, spec: InputSpec) -> Tensor:
        """All inputs in the teacher's normalised space, for a source."""
        ...

    def examples(self, spec: InputSpec) -> Any:
        """Inputs with the truth, as the task's `evaluate` takes them."""
        ...


class Task(Protocol):
    """What an input is and how an answer is judged; made from an `InputSpec` and a class count."""

    kind: str
    spec: InputSpec
    num_classes: int
    metric: str
    higher_is_better: bool

    def check(self, model: nn.Module) -> None:
        """Raise ShapeError if `model` cannot take such inputs or answers in another shape."""
        ...

    def evaluate(self, model: nn.Module, data: Any) -> Mapping[str, float]:
        """Metrics of `model` on `data`, `metric` among them; restores the training flags."""
        ...


@runtime_checkable
class JudgesInDetail(Protocol):
    """A task that tells more about a finished run than its metrics: `evaluation.json`.

    Asked once, after the last step; nothing is selected on it. A page shows the keys that it knows:
    see `details` of the task of classification.
    """

    def details(self, student: nn.Module, teacher: Any, data: Any) -> Mapping[str, Any]:
        """Plain values for JSON about `student` beside `teacher` on real test data.

        Args:
            student: what the run made.
            teacher: the one network it learned from, never a counted black box; None where there
                are several or it cannot be asked free of charge.
            data: as `evaluate` takes it.
        """
        ...


@runtime_checkable
class ShowsAnswers(Protocol):
    """A task whose answers can be drawn beside the inputs: `answers.png`.

    Asked once, after the last step; nothing is selected on it.
    """

    def answers(
        self, student: nn.Module, teacher: Any, data: Any, *, count: int = 6
    ) -> Mapping[str, Tensor]:
        """Columns of a picture by their headings, all with the same rows.

        Args:
            student: what the run made.
            teacher: as in `JudgesInDetail.details`; None leaves its column out.
            data: as `evaluate` takes it.
            count: rows, n; fewer where there are fewer inputs.

        Returns:
            Images (n, C, H, W) in [0, 1] with C 1 or 3, for example of input, teacher, student and
            truth, in this order.
        """
        ...


@runtime_checkable
class ReadsInputs(Protocol):
    """A task whose inputs are to be read rather than seen: `readings.json`."""

    def readings(self, inputs: Inputs, teacher: Any) -> list[str]:
        """One text for each input.

        Args:
            inputs: (N, ...), whatever the networks were shown.
            teacher: that they were shown to.
        """
        ...


@dataclass
class Progress:
    """How far a run is; schedules and methods read it, the trainer writes it.

    Attributes:
        loop: name of the loop that runs, "" before the first.
        round: finished rounds of that loop.
        rounds: all rounds of that loop.
        steps: optimizer steps of the whole run.
        finished: rounds of each loop that is over.
        round_steps: optimizer steps since the running round began.
        steps_per_round: of the last finished round; 0 before there is one.
    """

    loop: str = ""
    round: int = 0
    rounds: int = 0
    steps: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    round_steps: int = 0
    steps_per_round: int = 0

    @property
    def position(self) -> float:
        """Like `fraction`, and within a round by its steps: for what starts late in a run.

        Within the first round of a run it stands still, since nothing tells how long a round is.
        """
        within = self.round_steps / self.steps_per_round if self.steps_per_round else 0.0
        return (self.round + min(1.0, within)) / self.rounds if self.rounds else 0.0

    @property
    def fraction(self) -> float:
        """Share of the running loop's rounds that is finished, in [0, 1]."""
        return self.round / self.rounds if self.rounds else 0.0


class PluginContext(Protocol):
    """What a plug-in may ask of whoever runs it; names and streams are its own."""

    @property
    def rng(self) -> torch.Generator: ...

    @property
    def progress(self) -> Progress: ...

    @property
    def device(self) -> torch.device: ...

    def generator(self, name: str) -> torch.Generator:
        """A stream of randomness that does not disturb `rng`; saved with the run."""
        ...

    def optimizer(
        self,
        name: str,
        params: Iterable[nn.Parameter],
        factory: OptimizerFactory,
        schedule: Schedule | None = None,
        *,
        fresh: bool = False,
    ) -> Optimizer:
        """An optimizer that is saved with the run, or a `fresh` one that lives within a round."""
        ...


class Context(PluginContext, Protocol):
    """What a method may ask of whoever runs it."""

    def rounds(self, name: str, n: int) -> Iterator[int]:
        """The named loop's round numbers; skips what a resumed run has done already."""
        ...

    def update(
        self,
        role: Role,
        model: nn.Module,
        loss_fn: LossFn,
        batch: Batch,
        *optimizers: Optimizer,
        clip: float | None = None,
        accumulate: int = 1,
    ) -> Step:
        """One optimizer step on `loss_fn(model, batch)`."""
        ...

    def apply(
        self,
        role: Role,
        grads: Mapping[nn.Parameter, Tensor],
        *optimizers: Optimizer,
        loss: Loss | None = None,
    ) -> Step:
        """One optimizer step on gradients that the paper forms itself; `loss` is for the curves."""
        ...

    def took(self, role: Role, loss: Loss | None = None) -> Step:
        """One step that was taken elsewhere: by clients, each on its own."""
        ...


class Method(Protocol):
    """A published system: its file holds `Config`, this class and the paper's loop.

    It may also have `variant() -> str`, which names the options that are on, "" for the method as
    published; it stands beside the name wherever results are shown. And it may have a class method
    `suggest(task, teachers, student) -> Mapping[str, Any]`: settings that it derives from the input
    spec, the number of classes and the networks, for whoever gives none. They are the lowest layer,
    below what a recipe or a caller says, and do not touch the defaults of `Config`, which stay the
    paper's. It draws nothing, reads no clock and leaves the networks as they are, so that a resumed
    run gets the same.
    """

    Config: type[BaseModel]
    requires: Requires

    def __init__(
        self,
        cfg: Any,
        task: Task,
        teachers: Sequence[Teacher],
        student: nn.Module,
        sources: Mapping[str, Source],
    ) -> None:
        """Builds its parts; draws nothing."""
        ...

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """Everything with state, by name."""
        ...

    def run(self, ctx: Context) -> Iterator[Step]:
        """The algorithm; yields after each optimizer step."""
        ...

    def result(self) -> Result:
        """What the user gets."""
        ...

    def passes(self, cfg: Any) -> Mapping[str, float]:
        """Passes of each network per round, the ones that the algorithm cannot avoid."""
        ...


@dataclass(frozen=True)
class StudentUpdate:
    """What a gradient plug-in may work with.

    Attributes:
        model: the live student.
        loss_fn: the method's loss; pure, so it can be called at other weights and on other batches.
            It works on a batch that has inputs alone: what a method keeps in `extra` (labels,
            answers of the teacher) it must be able to do without or to compute.
        batch: the batch of this update, after every plug-in's `student_batch`.
        params: the student's parameters that this update moves, by name; what else it moves (a
            projection head) is left to the method.
    """

    model: nn.Module
    loss_fn: LossFn
    batch: Batch
    params: Mapping[str, nn.Parameter]


@runtime_checkable
class SourceTerms(Protocol):
    """A plug-in that adds terms to the loss of role "source"."""

    def source_terms(self, loss: Loss, batch: Batch) -> Mapping[str, Tensor]:
        """Further terms, each already weighted; gradient flows through `loss.inputs`."""
        ...


@runtime_checkable
class StudentBatch(Protocol):
    """A plug-in that weights or drops rows before the student sees them."""

    def student_batch(self, batch: Batch) -> Batch:
        """`batch.weighted(...)`, `batch.rows(...)` or the batch as it is."""
        ...


@runtime_checkable
class StudentGradient(Protocol):
    """A plug-in that wraps the student's gradient; nests in command-line order, first outermost."""

    def student_gradient(self, update: StudentUpdate, following: "Following") -> Loss:
        """Leave the gradient in `.grad` of `update.params`.

        Args:
            update: model, loss, batch and parameters.
            following: leaves the inner gradient in `.grad`, whatever was there, and returns its
                loss without graph; with a batch, for that one instead of `update.batch`.
        """
        ...


class Following(Protocol):
    """What a gradient plug-in is wrapped around: the plug-ins inside it and the method's loss."""

    def __call__(self, batch: Batch | None = None, /) -> Loss: ...


@runtime_checkable
class StudentOptimizers(Protocol):
    """A plug-in that steps the student with an optimizer of its own, for example late in a run."""

    def student_optimizers(
        self, given: Sequence[Optimizer], clip: float | None
    ) -> tuple[Sequence[Optimizer], float | None]:
        """What to step and clip instead.

        Args:
            given: the method's optimizers over parameters of the student; others it steps stay.
            clip: the method's largest norm of the gradient.
        """
        ...


class Plugin(Protocol):
    """Wraps updates of any method.

    Besides what is listed here it has one or more of the hooks `source_terms`, `student_batch`,
    `student_gradient` and `student_optimizers`.
    """

    Config: type[BaseModel]
    requires: Requires

    def __init__(self, cfg: Any) -> None: ...

    def setup(
        self, task: Task, teachers: Sequence[Teacher], student: nn.Module, ctx: PluginContext
    ) -> None:
        """Called once before the method runs; asks for its optimizers and generators here.

        Their names are the plug-in's own: `ctx` keeps them apart from the method's.
        """
        ...

    def parts(self) -> Mapping[str, Stateful | Sharded]:
        """Everything with state, by name."""
        ...
