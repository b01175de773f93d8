"""Attention whose gradient is computed in fp32 on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PLAIN = "sdpa"  # transformers' name of PyTorch's scaled_dot_product_attention
FAST_GRADIENT = "sdpa_fp32_gradient"  # ours


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute attention as transformers' ``sdpa``, in fp32 if a CPU needs its gradient in bf16.

    Up to 128 tokens, PyTorch's CPU kernel for the gradient is 3 to 12 times slower in bf16 than in fp32. Up to 2,048
    it is no faster. Without a gradient, and on other devices, nothing changes.

    Args:
        module: the attention layer.
        query: (B, heads, L, d).
        key: (B, heads, L, d), or fewer heads.
        value: as ``key``.
        attention_mask: boolean or additive mask, broadcast to (B, heads, L, L). None: no mask.
        **options: what transformers passes to an attention function.

    Returns:
        The states (B, L, heads, d) in the dtype that ``sdpa`` gives them, and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    slow = query.device.type == "cpu" and dtype == torch.bfloat16
    if not (slow and torch.is_grad_enabled() and query.requires_grad):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        states, weights = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
    return states.to(dtype), weights


def use_fast_gradient(encoder: Any) -> None:
    """Let an encoder that uses ``sdpa`` use :func:`attention`. Other encoders stay as they are.

    Args:
        encoder: Hugging Face model. Its saved configuration does not change.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if getattr(encoder.config, "_attn_implementation", None) != PLAIN or not encoder._can_set_attn_implementation():
        return
    AttentionInterface.register(FAST_GRADIENT, attention)
    AttentionMaskInterface.register(FAST_GRADIENT, sdpa_mask)
    encoder.set_attn_implementation(FAST_GRADIENT)
