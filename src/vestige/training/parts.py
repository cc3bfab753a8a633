"""Everything of a run that has state, and the networks among it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vestige.core.federation import Clients
from vestige.core.protocols import HoldsNetworks, Method, Plugin, Source, Stateful, Teacher


def run_parts(
    method: Method,
    plugins: Mapping[str, Plugin],
    teachers: Sequence[Teacher],
    sources: Mapping[str, Source],
) -> dict[str, Any]:
    """Parts by name; networks of teachers have none, since nothing may change them."""
    found: dict[str, Any] = {f"method.{name}": part for name, part in method.parts().items()}
    for plugin_name, plugin in plugins.items():
        for name, part in plugin.parts().items():
            found[f"plugin.{plugin_name}.{name}"] = part
    for index, teacher in enumerate(teachers):
        if isinstance(teacher, Stateful) and not isinstance(teacher, nn.Module):
            found[f"teacher.{index}"] = teacher
    for name, source in sources.items():
        # What was asked of clients is kept by them, whatever their method is.
        if isinstance(source, Clients) and isinstance(source, Stateful):
            found[f"source.{name}"] = source
    return found


def networks_of(parts: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Parts that are modules, and the modules that other parts hold as "part/key"."""
    found: dict[str, nn.Module] = {}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            found[name] = part
        elif isinstance(part, HoldsNetworks):
            found |= {f"{name}/{key}": network for key, network in part.networks().items()}
    return found
