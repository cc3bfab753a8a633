"""What a federated run leaves besides its network: federated.json, and who holds what."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vestige.training.files import write_json


def write_federation(out: Path, facts: Mapping[str, Any]) -> None:
    """federated.json, schema 1."""
    write_json(out / "federated.json", dict(facts))
