"""Find, keep and count the layers of an encoder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from jasper_fast.models.backbone import drop_pooler
from jasper_fast.models.probes import ENCODER_ERRORS
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import first_line

NOT_PER_LAYER = ("architectures", "token_id", "tokens", "token_ids")  # endings of lists that are not per layer


def layer_list(encoder: nn.Module) -> str | None:
    """Return the path of the one module list that holds the layers, or None if layers are shared or hidden."""
    count = getattr(encoder.config, "num_hidden_layers", None)
    paths = [name for name, m in encoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outermost = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    return outermost[0] if len(outermost) == 1 else None


def keep_layers(encoder: Any, layers: int | Sequence[int]) -> Any:
    """Build a model of the same architecture with some of its layers.

    The model is built from the shortened configuration, so a saved copy loads as the model that was trained.

    Args:
        encoder: Hugging Face model.
        layers: number of layers to keep, first to last, or the indices of the layers to keep, in their new order.

    Raises:
        JasperError: A layer does not exist, or the architecture does not allow the choice.
    """
    path = layer_list(encoder)
    if path is None:
        raise JasperError(unknown_layers_message(encoder))
    total = len(encoder.get_submodule(path))
    chosen = list(range(layers)) if isinstance(layers, int) else list(layers)
    if not chosen or max(chosen) >= total or len(set(chosen)) != len(chosen):
        raise JasperError(
            f"student.layers: the model has {total} layers (got {layers}). Fix: give a number from 1 to {total}, "
            f"or distinct indices from 0 to {total - 1}, e.g. {list(range(0, total, 2))}"
        )
    settings = copy.deepcopy(encoder.config)
    settings.num_hidden_layers = len(chosen)
    for name, value in encoder.config.to_dict().items():
        if isinstance(value, list) and len(value) == total and not name.endswith(NOT_PER_LAYER):
            setattr(settings, name, [value[i] for i in chosen])  # e.g. layer_types, attention_window
    weights = _weights_of_layers(encoder, path, chosen)
    try:
        shorter = type(encoder)(settings)
        drop_pooler(shorter)
        shorter.load_state_dict(weights)
    except ENCODER_ERRORS as error:
        raise JasperError(
            f"student.layers: {type(encoder).__name__} cannot keep layers {chosen} alone, because its layers are built "
            f"differently by position ({first_line(error)}). Fix: begin with layer 0, or leave student.layers out"
        ) from error
    return shorter


def _weights_of_layers(encoder: Any, path: str, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
    """Select the weights of the chosen layers, renumbered, and all weights outside the layers."""
    position = {str(old): str(new) for new, old in enumerate(chosen)}
    weights = {}
    for name, value in encoder.state_dict().items():
        if name.startswith(f"{path}."):
            index, _, rest = name.removeprefix(f"{path}.").partition(".")
            if index not in position:
                continue
            name = f"{path}.{position[index]}.{rest}"
        weights[name] = value
    return weights


def unknown_layers_message(encoder: nn.Module) -> str:
    """Return the error message for an encoder whose layers cannot be counted."""
    return (
        f"{type(encoder).__name__} has no single list of {getattr(encoder.config, 'num_hidden_layers', '?')} layers "
        "(some architectures share one layer's weights). Fix: leave student.layers empty and name parameters in `train`"
    )
