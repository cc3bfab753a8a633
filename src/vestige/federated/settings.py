"""How a federation is run; nothing here changes what is learned, but for who is left out."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class FederationConfig(BaseModel):
    """The engine behind a federation's clients.

    Attributes:
        engine: "ray" runs clients in worker processes, on this machine or on a cluster;
            "in-process" one after another in this process, which is faster for small networks.
        address: of a running Ray cluster, for example "auto" or "10.0.0.1:6379"; null starts
            workers on this machine.
        client_cpus: cores that a client takes on Ray; as many clients as fit run at a time.
        client_gpus: share of a GPU that a client takes on Ray; above 0 it computes there.
        timeout_s: that clients have for an answer; whoever is later is left out of the round. null
            waits for all of them.
        least: valid answers that make a round; with fewer it is void.
        judges: at most so many clients test their networks at an evaluation, spread evenly over
            all; 0 asks none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    engine: Literal["ray", "in-process"] = "ray"
    address: str | None = None
    client_cpus: float = Field(1.0, gt=0)
    client_gpus: float = Field(0.0, ge=0)
    timeout_s: float | None = Field(None, gt=0)
    least: int = Field(1, ge=1)
    judges: int = Field(100, ge=0)
