"""Attention of the U-Net: the kernel that computes it, and the probabilities of chosen layers."""

from collections.abc import Collection
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn


def use_attention_backend(unet: nn.Module, attention: Literal["sdpa", "xformers"]) -> None:
    """Compute all attention of the U-Net with PyTorch's fused kernel (sdpa) or with xformers.

    Raises:
        ValueError: xformers without CUDA or without the package (it imports on a CPU, but computes nothing
            there), or an unknown name.
    """
    if attention == "sdpa":
        unet.set_attn_processor(AttnProcessor2_0())
        return
    if attention != "xformers":
        raise ValueError(f"attention: {attention!r} is not known: set `attention` to sdpa or xformers.")
    lacks = [] if torch.cuda.is_available() else ["CUDA"]
    lacks += [] if find_spec("xformers") else ["the package xformers (pip install -e .[gpu])"]
    if lacks:
        raise ValueError(
            f"attention: xformers cannot run on this machine, which has not {' and not '.join(lacks)}. "
            "Set `attention: sdpa`."
        )
    unet.set_attn_processor(XFormersAttnProcessor())


class RecordAttention:
    """Attention processor that leaves the output to the original one and stores the probabilities besides."""

    def __init__(self, original, layer: str, weights: dict[str, Tensor]):
        self.original, self.layer, self.weights = original, layer, weights

    @torch.compiler.disable  # a compiled layer must store at every call, not only while it is traced
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args,
        **kwargs,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(source))
        # [B * heads, queries, keys], in fp32 where the model upcasts its attention
        self.weights[self.layer] = attn.get_attention_scores(query, key).unflatten(0, (-1, attn.heads))
        return self.original(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def attention_layers(unet: nn.Module, kind: Literal["self", "cross"]) -> list[str]:
    """Names of the self- or cross-attention layers in the order in which they run."""
    end = {"self": ".attn1", "cross": ".attn2"}[kind]
    names = [name for name, module in unet.named_modules() if isinstance(module, Attention)]
    # "down_blocks" < "mid_block" < "up_blocks"; the U-Net itself holds the middle last.
    return sorted((name for name in names if name.endswith(end)), key=lambda name: name.split(".")[0])


@contextmanager
def record_attention(unet: nn.Module, layers: Collection[str]):
    """Inside the block every U-Net call fills the yielded {layer: probabilities [B, heads, queries, keys]}.

    Only these layers (names as in attention_layers) compute probabilities, next to their fused result:
    the U-Net's result stays the same bit for bit. Memory is heads * queries * keys per layer and image.

    Raises:
        ValueError: the U-Net has no layer of this name.
    """
    original = dict(unet.attn_processors)
    unknown = [layer for layer in layers if f"{layer}.processor" not in original]
    if unknown:
        raise ValueError(
            f"The U-Net has no attention layer {', '.join(map(repr, unknown))}: its layers are named like "
            f"{next(iter(original)).removesuffix('.processor')!r}; attention_layers(unet, kind) lists them."
        )
    weights: dict[str, Tensor] = {}
    recorders = {
        f"{layer}.processor": RecordAttention(original[f"{layer}.processor"], layer, weights)
        for layer in layers
    }
    unet.set_attn_processor(original | recorders)
    try:
        yield weights
    finally:
        unet.set_attn_processor(original)  # an exception must not leave the U-Net instrumented
