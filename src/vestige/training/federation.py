"""What a federated run leaves besides its network: federated.json, and who holds what."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vestige.training.files import write_json
from vestige.training.holdings import write_holdings


def write_federation(out: Path, facts: Mapping[str, Any]) -> None:
    """federated.json, schema 1, and clients.png where it is known who holds what."""
    write_json(out / "federated.json", dict(facts))
    holds = facts["holds"]
    if "counts" in holds:
        write_holdings(out, holds["counts"], holds["classes"])
