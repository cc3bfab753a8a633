"""The clients that a recipe names: who holds what, on which engine, and how they are judged."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from tempfile import mkdtemp
from typing import Any

from torch import Tensor, nn

from vestige.core import seeding
from vestige.core.federation import ClientData, ClientUpdate, Federated, RefinesAverage
from vestige.core.protocols import Source, Task
from vestige.core.types import InputSpec
from vestige.errors import DataError, RecipeError
from vestige.federated import records
from vestige.federated.federation import Engine, Federation
from vestige.federated.grid import in_process
from vestige.federated.partition import PartitionConfig, TestMode, class_counts, held_out
from vestige.federated.settings import FederationConfig
from vestige.federated.simulation import on_ray
from vestige.federated.states import ClientStates
from vestige.metrics.clients import client_scores
from vestige.recipes.catalog import DATA
from vestige.recipes.examples import fit_classes
from vestige.recipes.schema import Recipe, SourceConfig
from vestige.recipes.sources import Ledger, record_of
from vestige.training import guard

# What a method leaves whose clients keep networks of their own.
PERSONAL = "personal models"
# The score of what averaging gave, where the server goes on from there.
AVERAGED = "averaged"
_LAST = 10


@dataclass(frozen=True)
class Dealt:
    """The clients' shares of a set.

    Attributes:
        train: inputs and labels of the train split.
        test: of the test split.
        rows: of `train`, by client.
        held: rows of `test`, by client.
        counts: (clients, C), examples of each class.
        classes: names.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    rows: list[Tensor]
    held: list[Tensor]
    counts: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class SimulatedClients:
    """Deals a real set to clients that exist in a simulation only; gives one client's examples.

    Equal ones deal alike, in any process, and each process opens the set once.
    """

    data: str
    spec: InputSpec
    num_classes: int
    partition: PartitionConfig
    test_part: TestMode
    test_each: int | None
    seed: int

    def __call__(self, partition: int, count: int) -> ClientData:
        """The examples of one client.

        Raises:
            DataError: the set is missing, or too small for so many clients.
        """
        if count != self.partition.clients:
            raise DataError(
                f"got {count} nodes, expected {self.partition.clients} as in the recipe's partition"
            )
        dealt = deal(self)
        rows, held = dealt.rows[partition], dealt.held[partition]
        return ClientData(
            dealt.train[0][rows],
            dealt.train[1][rows],
            self.num_classes,
            dealt.test[0][held],
            dealt.test[1][held],
        )


@lru_cache(maxsize=2)
def deal(clients: SimulatedClients) -> Dealt:
    """Open the set and deal it out."""
    kind, spec, classes = DATA.get(clients.spec.kind), clients.spec, clients.num_classes
    train, names = fit_classes(kind.open(clients.data, "train"), spec, (), classes)
    test, _ = fit_classes(kind.open(clients.data, "test"), spec, names, classes)
    rng = seeding.generator(clients.seed, "partition")
    rows = clients.partition.deal(train[1], classes, rng)
    counts = class_counts(rows, train[1], classes)
    held = held_out(counts, test[1], rng, mode=clients.test_part, each=clients.test_each)
    return Dealt(train, test, rows, held, counts, names)


def engine_of(config: FederationConfig) -> Engine:
    """What opens the grid."""
    if config.engine == "in-process":
        return in_process
    return partial(
        on_ray,
        client_cpus=config.client_cpus,
        client_gpus=config.client_gpus,
        address=config.address,
    )


def open_clients(
    config: SourceConfig,
    recipe: Recipe,
    spec: InputSpec,
    num_classes: int,
    out: Path | None,
    ledger: Ledger,
) -> Federation:
    """The clients of a simulation; what they hold is noted in `ledger`."""
    partition = config.partition or PartitionConfig()
    simulated = SimulatedClients(
        str(config.data),
        spec,
        num_classes,
        partition,
        config.test_part,
        config.test_each,
        recipe.seed,
    )
    active = recipe.known_config().get("active")
    if isinstance(active, int) and active > partition.clients:
        raise RecipeError(
            f"config.active: got {active} of {partition.clients} clients; lower it, or null for "
            "all of them"
        )
    # Here, once: what cannot be dealt out is told before any client is asked.
    deal(simulated)
    kind = DATA.get(spec.kind)
    ledger.records.append(
        record_of(
            kind.open(simulated.data, "train"), "client-private", ledger.reader, "distillation"
        )
    )
    # A run that is to leave nothing still has clients that keep something.
    folder = Path(mkdtemp(prefix="vestige-clients-")) if out is None else out / "clients"
    settings = recipe.federation
    return Federation(
        f"{partition.clients} clients of {simulated.data}",
        partition.clients,
        num_classes,
        engine=engine_of(settings),
        load_data=simulated,
        states=ClientStates(folder, keep=kept_rounds(recipe)),
        seed=recipe.seed,
        timeout_s=settings.timeout_s,
        least=settings.least,
        device="cuda" if settings.client_gpus > 0 else "cpu",
        # Threads of Flower and Ray open files of their own; the method itself stands still then.
        waiting=nullcontext if settings.engine == "in-process" else guard.pausing,
    )


def kept_rounds(recipe: Recipe) -> int:
    """How far back clients can go: an older checkpoint serves where the newest is broken."""
    return 4 * recipe.trainer.checkpoint_every


def federation_of(sources: Mapping[str, Source]) -> Federation | None:
    """The clients among the sources of a run."""
    return next((one for one in sources.values() if isinstance(one, Federation)), None)


@contextmanager
def opened(method: Any, sources: Mapping[str, Source]) -> Iterator[None]:
    """The federation of a run, if it has one, serves inside the block."""
    federation = federation_of(sources)
    if federation is None:
        yield
        return
    with federation.opened(method):
        yield


@dataclass
class Judging:
    """What a federated run is judged by: the server's test data, and the clients' own parts.

    Attributes:
        alone: judges one network on data of the server; None where it has none.
        federation: the clients.
        judges: at most so many of them are asked.
        method: once it is built.
        latest: the clients' answers at the last evaluation.
    """

    alone: Callable[[nn.Module], Mapping[str, float]] | None
    federation: Federation
    judges: int
    task: Task
    method: Federated | None = None
    latest: list[ClientUpdate] = field(default_factory=list)

    def __call__(self, network: nn.Module) -> Mapping[str, float]:
        """Metrics of the global network, and of what clients would use now."""
        method: Any = self.method
        personal = method.result().kind == PERSONAL
        scores = {} if self.alone is None or personal else dict(self.alone(network))
        if scores and isinstance(method, RefinesAverage):
            scores[AVERAGED] = self.alone(method.averaged)[self.task.metric]  # type: ignore[misc]
        self.latest = self.federation.judge(method, self._asked())
        if self.latest:
            told = self._told()
            scores |= {f"client_{name}": value for name, value in told.items()}
            scores["client_balanced_accuracy"] = fmean(
                update.metrics["balanced_accuracy"] for update in self.latest
            )
            if personal or self.alone is None:
                scores[self.task.metric] = told["mean"]
        return scores

    def _told(self) -> Mapping[str, float]:
        accuracies = [update.metrics["accuracy"] for update in self.latest]
        examples = [update.examples for update in self.latest]
        told: Mapping[str, float] = client_scores(accuracies, examples)
        return told

    def _asked(self) -> list[int]:
        count = self.federation.count
        if self.judges == 0:
            return []
        step = max(1.0, count / self.judges)
        return [int(index * step) for index in range(min(count, self.judges))]

    def facts(
        self, scores: Sequence[Mapping[str, float]], settings: FederationConfig
    ) -> dict[str, Any]:
        """What federated.json holds.

        Args:
            scores: of each evaluation, in order.
            settings: of the engine.
        """
        federation = self.federation
        last = [one[self.task.metric] for one in scores[-_LAST:] if self.task.metric in one]
        simulated = isinstance(federation.load_data, SimulatedClients)
        return {
            "schema": 1,
            "protocol": records.PROTOCOL,
            "engine": settings.engine if simulated else "deployment",
            "clients": federation.count,
            "holds": self._holds(),
            "rounds": [vars(one) for one in federation.exchanges],
            "leaves": list(federation.leaves.values()),
            "numbers": sorted(federation.numbers),
            "clients_at_end": [
                {
                    "partition": update.partition,
                    "examples": int(federation.holds.get(update.partition, 0)),
                    "test_examples": update.examples,
                    **update.metrics,
                }
                for update in self.latest
            ],
            "scores": dict(self._told()) if self.latest else {},
            "last_rounds": {"rounds": len(last), self.task.metric: fmean(last)} if last else {},
            "gain": self._gain(scores),
        }

    def _gain(self, scores: Sequence[Mapping[str, float]]) -> float | None:
        """What the server added to averaging, mean over the last evaluations."""
        gains = [
            one[self.task.metric] - one[AVERAGED] for one in scores[-_LAST:] if AVERAGED in one
        ]
        return fmean(gains) if gains else None

    def _holds(self) -> dict[str, Any]:
        load = self.federation.load_data
        if not isinstance(load, SimulatedClients):
            # Of real clients the server knows no more than their sizes.
            return {"sizes": self.federation.sizes().tolist()}
        dealt = deal(load)
        chosen = load.partition.model_dump(mode="json", exclude_none=True)
        return {
            "partition": chosen.pop("name"),
            **chosen,
            "classes": list(dealt.classes),
            "counts": dealt.counts.tolist(),
        }


def brief(facts: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """The part of federated.json that summary.json holds."""
    rounds = facts["rounds"]
    rejected: dict[str, int] = {}
    for one in rounds:
        for reason, count in one["rejected"].items():
            rejected[reason] = rejected.get(reason, 0) + count
    asked = [one["seconds"] for one in rounds]
    return {
        "clients": facts["clients"],
        "engine": facts["engine"],
        "exchanges": len(rounds),
        "asked": sum(one["asked"] for one in rounds),
        "answered": sum(one["answered"] for one in rounds),
        "rejected": rejected,
        "void": sum(one["void"] for one in rounds),
        "bytes_down": sum(one["bytes_down"] for one in rounds),
        "bytes_up": sum(one["bytes_up"] for one in rounds),
        "seconds": round(sum(asked), 3),
        **{f"client_{name}": value for name, value in facts["scores"].items()},
        "last_rounds": facts["last_rounds"].get(metric),
        "gain": facts["gain"],
    }
