"""A recipe between real machines: the server's half and a client's half, as called by Flower.

Both read the same recipe, so both know the method and the form of the network. What the recipe says
of the clients' data describes the simulation (`vestige run`); here each client brings its own and
only the number of clients is taken from the recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vestige.core.federation import Client, ClientData
from vestige.errors import RecipeError
from vestige.federated.apps import ClientHost, LoadData
from vestige.federated.deployed import ServerGrid, on_nodes, states_folder
from vestige.federated.federation import Federation
from vestige.federated.states import ClientStates
from vestige.recipes.build import build_method
from vestige.recipes.federation import SimulatedClients, kept_rounds
from vestige.recipes.loading import load_recipe
from vestige.recipes.resolve import resolve_teachers
from vestige.recipes.run import run_recipe
from vestige.recipes.schema import Recipe
from vestige.recipes.settle import settled
from vestige.recipes.student import build_student
from vestige.recipes.tasks import make_task
from vestige.training import guard

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

CLIENTS = "clients"


@dataclass(frozen=True)
class Roster:
    """Stands in for the clients where a method is built that asks none: at a client."""

    count: int
    origin: str = "client-private"
    name: str = CLIENTS
    paths: tuple[Path, ...] = ()


def run_on_grid(grid: "Grid", context: "Context", recipe: Path) -> dict[str, Any]:
    """Run a recipe at the server, with whoever is connected to Flower's grid as clients.

    Of the run config it takes "out", "resume", "wait-s" and what `deployed_recipe` takes.

    Args:
        grid: that Flower gave to the server app.
        context: likewise.
        recipe: file.

    Returns:
        The contents of summary.json.

    Raises:
        ProcessError: too few clients are connected.
    """
    config = context.run_config
    chosen = deployed_recipe(recipe, config)
    if chosen.num_classes is None:
        raise RecipeError("num_classes: clients must know it beforehand; add it to the recipe")
    key = _key(config, context.run_id)
    out = Path(str(config["out"])).expanduser().resolve() / f"run-{key}"
    count, settings = _count(chosen), chosen.federation
    engine = partial(
        on_nodes,
        # Flower opens certificates and the like in the middle of a run.
        grid=ServerGrid(grid, guard.pausing),
        wait_s=float(config["wait-s"]),
        least=settings.least,
    )
    federation = Federation(
        f"{count} clients",
        count,
        chosen.num_classes,
        engine=engine,
        load_data=nobody,
        states=ClientStates(out / CLIENTS, keep=kept_rounds(chosen)),
        seed=chosen.seed,
        timeout_s=settings.timeout_s,
        least=settings.least,
    )
    return run_recipe(chosen, out, resume=bool(config["resume"]), federation=federation)


def client_app(recipe: Path, load_data: LoadData) -> "ClientApp":
    """A client's app: it does what the recipe's method asks of a client, with its own examples.

    Of the node's configuration it takes "partition-id", "num-partitions", "device" and "state", a
    folder for what stays at the client between rounds.

    Args:
        recipe: file, the same as at the server.
        load_data: gives the examples of one client, from its number and the number of all.
    """
    from flwr.app import Message
    from flwr.clientapp import ClientApp

    app = ClientApp()

    def answer(message: "Message", context: "Context") -> "Message":
        node, config = context.node_config, context.run_config
        count = int(node["num-partitions"])
        folder = states_folder(str(node.get("state", ""))) / f"run-{_key(config, context.run_id)}"
        # Sorted text, which can be remembered: one process may answer many times.
        given = tuple(sorted((key, str(value)) for key, value in config.items()))
        client, keep = _client_of(recipe, given, count)
        host = ClientHost(
            client,
            load_data,
            ClientStates(folder, keep=keep),
            device=str(node.get("device", "cpu")),
        )
        content = host.answer(message.content, int(node["partition-id"]), count)
        return Message(content=content, reply_to=message)

    app.train()(answer)
    app.evaluate()(answer)
    app.query()(answer)
    return app


def deployed_recipe(recipe: Path, config: Mapping[str, Any]) -> Recipe:
    """The recipe of a run: the file, and what the run config changes in it.

    Args:
        recipe: file.
        config: of the run; "clients" is their number, and "set" holds overrides, apart by blanks,
            as of `vestige run --set`.

    Raises:
        RecipeError: a mistake in either, or no clients.
    """
    name = source_name(load_recipe(recipe))
    count = f"sources.{name}.partition.clients={config['clients']}"
    return load_recipe(recipe, overrides=[count, *str(config["set"]).split()])


def client_of(recipe: Recipe, count: int) -> Client:
    """The client's half of the recipe's method; it opens no data.

    Args:
        recipe: validated.
        count: of all clients.
    """
    loaded = resolve_teachers(recipe)[0]
    task = make_task(recipe.task, loaded.spec, loaded.num_classes, recipe.task_config)
    student = None
    if recipe.student is not None:
        student = build_student(
            recipe.student, loaded.spec, task.num_classes, recipe.seed, loaded.module
        )
    recipe = settled(recipe, task, [], student)
    sources: Mapping[str, Any] = {source_name(recipe): Roster(count)}
    method = build_method(
        recipe.method, recipe.method_config(), task, [], student, sources, recipe.seed
    )
    client: Client = method.client
    return client


def simulated_data(recipe: Path, partition: int, count: int) -> ClientData:
    """What `vestige run` deals out to one client; an example for a client without data.

    Args:
        recipe: file.
        partition: number of the client.
        count: of all clients.
    """
    chosen = load_recipe(recipe)
    settings = chosen.sources[source_name(chosen)]
    loaded = resolve_teachers(chosen)[0]
    partitions = settings.partition
    if partitions is None or settings.data is None:
        raise RecipeError(
            "sources.clients: got no data and partition, expected both to deal examples out; fill "
            "in load_data"
        )
    dealt = SimulatedClients(
        settings.data,
        loaded.spec,
        loaded.num_classes,
        partitions.model_copy(update={"clients": count}),
        settings.test_part,
        settings.test_each,
        chosen.seed,
    )
    return dealt(partition, count)


def nobody(partition: int, count: int) -> ClientData:
    """The data of a client, of which the server has none.

    Raises:
        RecipeError: always.
    """
    raise RecipeError(f"got a request for the data of client {partition}, which stays with it")


@cache
def _client_of(recipe: Path, config: tuple[tuple[str, str], ...], count: int) -> tuple[Client, int]:
    chosen = deployed_recipe(recipe, dict(config))
    # Clients of one machine share its cores.
    if chosen.trainer.threads is not None:
        torch.set_num_threads(chosen.trainer.threads)
    return client_of(chosen, count), kept_rounds(chosen)


def source_name(recipe: Recipe) -> str:
    """What a recipe calls its clients.

    Raises:
        RecipeError: it has none.
    """
    found = [name for name, source in recipe.sources.items() if source.kind == CLIENTS]
    if not found:
        raise RecipeError(
            f"sources: got {sorted(recipe.sources) or 'none'}, expected one of kind 'clients'; a "
            "method that is not federated has nothing to ask of clients"
        )
    return found[0]


def _count(recipe: Recipe) -> int:
    partition = recipe.sources[source_name(recipe)].partition
    if partition is None:
        raise RecipeError("sources.clients.partition: got none, expected the number of clients")
    return partition.clients


def _key(config: Mapping[str, Any], run_id: int) -> str:
    """Of a run's folders: a resumed run has those of the run that it goes on with."""
    return str(config["resume"]) or str(run_id)
