"""How a federation behaves as it has more clients: seconds, memory and bytes on both engines."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

from vestige.bench.scale_cases import Measured, memory_mib
from vestige.core import seeding
from vestige.core.federation import ClientData, Federated
from vestige.core.types import InputSpec
from vestige.federated.federation import Federation
from vestige.federated.partition import dirichlet_by_client
from vestige.federated.settings import FederationConfig
from vestige.federated.states import ClientStates
from vestige.methods.fedgen import FedGen, FedGenConfig
from vestige.models.factory import build_model
from vestige.recipes.federation import engine_of
from vestige.tasks.classification import Classification
from vestige.training.context import RunContext

SPEC = InputSpec.image(1, 28, 28, mean=(0.5,), std=(0.5,))
CLASSES, EACH, ROUNDS = 10, 40, 4
# What the table on paper goes to, beyond the largest size that was measured.
_PAPER = (10, 100)


@dataclass(frozen=True)
class MadeClients:
    """Clients of 40 made-up images each, 28x28, dealt by `dirichlet-by-client` with alpha 0.3."""

    count: int

    def __call__(self, partition: int, count: int) -> ClientData:
        """The images of one client: a pattern for each class, and noise."""
        labels = _dealt(count)[partition]
        patterns = torch.randn(CLASSES, *SPEC.shape, generator=seeding.generator(0, "patterns"))
        rng = seeding.generator(partition, "noise")
        inputs = patterns[labels] + 0.5 * torch.randn(len(labels), *SPEC.shape, generator=rng)
        return ClientData(inputs, labels, CLASSES, inputs[:0], labels[:0])


@lru_cache(maxsize=1)
def _dealt(count: int) -> list[Tensor]:
    labels = torch.arange(CLASSES).repeat(-(-count * EACH // CLASSES))
    rng = seeding.generator(0, "partition")
    rows = dirichlet_by_client(labels, count, rng, alpha=0.3, each=EACH)
    return [labels[one] for one in rows]


def measure_federation(
    clients: int, folder: Path, *, active: int = 50, engines: Sequence[str] = ("in-process", "ray")
) -> Measured:
    """FedGen with its network and steps for MNIST, on both engines.

    Args:
        clients: of the federation.
        folder: gets what clients keep.
        active: clients that are asked in a round, of `clients` if there are fewer.
        engines: to measure, in this order.

    Returns:
        "active"; "down_kib" and "up_kib" of one client in a round with a generator; for "direct"
        (the engine within the process) and "ray" (a worker for each core): "_join_seconds" until
        all clients have told how much they hold, "_round_seconds", the median of all rounds but the
        first, which has no generator, and "_server_mib", what this process grew by;
        "ray_workers_mib", what Ray's processes hold, pages that they share counted once.
    """
    asked = min(active, clients)
    found: Measured = {"active": asked}
    for engine in engines:
        name = "direct" if engine == "in-process" else engine
        before = memory_mib("VmRSS")
        run = _run(engine, clients, asked, folder / name)
        found |= {f"{name}_{key}": value for key, value in run.items() if "kib" not in key}
        found[f"{name}_server_mib"] = max(0.0, memory_mib("VmRSS") - before)
        found |= {key: value for key, value in run.items() if "kib" in key}
    return found


def _run(engine: str, clients: int, active: int, folder: Path) -> Measured:
    config = FederationConfig.model_validate({"engine": engine})
    federation = Federation(
        "made-up clients",
        clients,
        CLASSES,
        engine=engine_of(config),
        load_data=MadeClients(clients),
        states=ClientStates(folder, keep=1),
        seed=0,
    )
    with seeding.seeded(0, "student"):
        network = build_model("stride-cnn", SPEC, CLASSES)
    settings = FedGenConfig(rounds=ROUNDS, active=active)
    task = Classification(SPEC, CLASSES)
    with seeding.seeded(0, "method"):
        method = FedGen(settings, task, [], network, {"clients": federation})
    ends: list[float] = []

    def on_round() -> bool:
        ends.append(time.perf_counter())
        return True

    ctx = RunContext(
        seed=0,
        device=torch.device("cpu"),
        plugins={},
        reduce=lambda parameters: None,
        on_loop=lambda name, rounds: 0,
        on_round=on_round,
    )
    start = time.perf_counter()
    with federation.opened(cast(Federated, method)):
        joined = time.perf_counter() - start
        for _ in method.run(ctx):
            pass
        workers = _workers_mib()
    last = federation.exchanges[-1]
    found = {
        "join_seconds": joined,
        "round_seconds": median(b - a for a, b in pairwise(ends)),
        "down_kib": last.bytes_down / last.asked / 1024,
        "up_kib": last.bytes_up / last.asked / 1024,
    }
    return found if engine == "in-process" else {**found, "workers_mib": workers}


def _workers_mib() -> float:
    """Memory of the processes that this one started and those that they started, shared once."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with _gone():
            # The name, in brackets, may hold spaces.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    mine = {int(Path("/proc/self").resolve().name)} if parents else set()
    below: set[int] = set()
    while found := {child for child, parent in parents.items() if parent in mine | below} - below:
        below |= found
    kib = 0
    for process in below:
        with _gone():
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kib / 1024


@contextmanager
def _gone() -> Iterator[None]:
    """A process may end while it is looked at."""
    try:
        yield
    except OSError:
        return


def paper_table(sizes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What follows for more clients, by arithmetic alone: nothing in it was run.

    Seconds to join and memory are carried on along the line through the two largest sizes, rounds
    and bytes by the cost of one client that is asked.
    """
    small, large = sizes[-2], sizes[-1]
    active = large["active"]

    def along(key: str, clients: int) -> float:
        slope = (large[key] - small[key]) / (large["clients"] - small["clients"])
        return float(large[key] + max(0.0, slope) * (clients - large["clients"]))

    lines = [
        f"By arithmetic, nothing of it was run, with the same {active} clients asked in a round "
        "and with the same share of all. Joining and memory go on along the line through the two "
        "largest sizes; a round costs its clients that are asked.",
        "",
        "| clients | asked | in-process join s | in-process round s | in-process MiB "
        "| Ray join s | Ray round s | Ray workers MiB | MiB down | MiB up |",
        f"|{' ---: |' * 10}",
    ]
    for factor in _PAPER:
        clients = factor * large["clients"]
        for asked in (active, factor * active):
            more = asked / active
            columns = (
                f"{clients:,d}",
                f"{asked:,d}",
                f"{along('direct_join_seconds', clients):,.0f}",
                f"{large['direct_round_seconds'] * more:,.1f}",
                f"{along('direct_server_mib', clients):,.0f}",
                f"{along('ray_join_seconds', clients):,.0f}",
                f"{large['ray_round_seconds'] * more:,.1f}",
                f"{along('ray_workers_mib', clients):,.0f}",
                f"{large['down_kib'] * asked / 1024:,.1f}",
                f"{large['up_kib'] * asked / 1024:,.1f}",
            )
            lines.append(f"| {' | '.join(columns)} |")
    return lines
