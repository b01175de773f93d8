"""The heads of an exported model folder: where they are, and loading their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

ROUTER = "2_Router"  # folder of the heads


def routes_of(source: Path) -> dict[int, str]:
    """Map each width to the folder of its head, relative to the Router's folder, widest first.

    Args:
        source: model folder.

    Raises:
        JasperError: the Router's settings are damaged, or its routes are not widths.
    """
    file = source / ROUTER / "router_config.json"
    try:
        structure = json.loads(file.read_text(encoding="utf-8"))["structure"]
        routes = {int(name): str(folders[0]) for name, folders in structure.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise JasperError(f"{file} is damaged ({first_line(error)}). Fix: export the run again") from error
    if not routes:
        raise JasperError(f"{file}: no heads are listed. Fix: export the run again")
    return dict(sorted(routes.items(), reverse=True))


def load_heads(heads: Mapping[str, nn.Module] | nn.ModuleDict, folder: Path) -> None:
    """Load the weights of heads by their widths.

    Args:
        heads: linear layers by width, whose weights are replaced.
        folder: model folder.

    Raises:
        JasperError: the folder has no such head, or a file is damaged.
    """
    if not (folder / ROUTER / "router_config.json").is_file():
        raise JasperError(
            f"{folder}: no heads to start from (got no {ROUTER}/router_config.json, expected a model that a run "
            "exported). Fix: set student.head_init to identity or random"
        )
    routes = routes_of(folder)
    for name, head in heads.items():
        file = folder / ROUTER / routes.get(int(name), str(name)) / "model.safetensors"
        try:
            weights = {key.removeprefix("linear."): value for key, value in load_file(file).items()}
            head.load_state_dict(weights)
        except (OSError, SafetensorError, RuntimeError) as error:  # missing, damaged, or of another width
            raise JasperError(f"{file} cannot be loaded ({first_line(error)}). Fix: export the run again") from error
