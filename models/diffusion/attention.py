"""Attention of the U-Net: the kernel that computes it, and the probabilities of chosen layers."""

from collections import Counter
from collections.abc import Collection
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn

from functional.attention_maps import level_of


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


class _AllAttended(Exception):
    """Leaves the U-Net's forward as soon as the last cross-attention is known."""


@dataclass
class WordAttention:
    """What one call of the U-Net tells about the word of each of its B prompts.

    Attributes:
        maps: by level (0 has the latent's size, each next one half of it) the mean over layers and heads of
            the attention to the word's tokens, [B, queries], float32.
        finest: queries and keys [B, heads, queries, width] of the self-attention layers of level 0. Their
            probabilities are never built: functional.attention_maps.complete_by_layers.
    """

    maps: dict[int, Tensor] = field(default_factory=dict)
    heads: Counter = field(default_factory=Counter)  # how many are in each level's sum
    finest: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, level: int, probabilities: Tensor) -> None:
        """Add a layer's attention to the words, [B, heads, queries], to the mean of its level."""
        count = self.heads[level]
        self.heads[level] = total = count + probabilities.shape[1]
        before = self.maps.get(level, 0)
        self.maps[level] = (before * count + probabilities.sum(1, dtype=torch.float32)) / total


class TapWords:
    """Attention processor that keeps the attention to words, and leaves the output to the original one."""

    def __init__(self, original, level: int, words: Tensor, found: WordAttention, last: bool):
        self.original, self.level, self.words, self.found, self.last = original, level, words, found, last

    @torch.compiler.disable
    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, *args, **kwargs
    ):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        scores = attn.get_attention_scores(query, key).unflatten(0, (-1, attn.heads))
        # No matrix product, which autocast would do in half precision.
        self.found.add(self.level, (scores.float() * self.words[:, None, None]).sum(-1))
        if self.last:
            raise _AllAttended
        return self.original(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


class TapQueries:
    """Attention processor that keeps queries and keys, and leaves the output to the original one."""

    def __init__(self, original, found: WordAttention, last: bool):
        self.original, self.found, self.last = original, found, last

    @torch.compiler.disable
    def __call__(self, attn: Attention, hidden_states: Tensor, *args, **kwargs):
        heads = [attn.head_to_batch_dim(of(hidden_states), out_dim=4) for of in (attn.to_q, attn.to_k)]
        query, key = (part.float() for part in heads) if attn.upcast_attention else heads
        self.found.finest.append((query, key))
        if self.last:
            raise _AllAttended
        return self.original(attn, hidden_states, *args, **kwargs)


def attend_to_words(
    unet: nn.Module,
    words: Tensor,
    latent: Tensor,
    timestep: Tensor | int,
    context: Tensor,
    levels: Collection[int] = range(4),
    keep_queries: bool = True,
) -> WordAttention:
    """Attention of one U-Net call to one word per prompt; nothing runs after the last layer that is needed.

    Args:
        words: [B, tokens], the weight of each token in the mean over a word's tokens.
        latent: [B, C, h, w]. context: [B, tokens, width].
        levels: those whose cross-attention is wanted.
        keep_queries: whether the finest self-attention is wanted.
    """
    found, original, num_blocks = WordAttention(), dict(unet.attn_processors), len(unet.up_blocks)
    cross = [name for name in attention_layers(unet, "cross") if level_of(name, num_blocks) in levels]
    own = [
        name for name in attention_layers(unet, "self") if keep_queries and level_of(name, num_blocks) == 0
    ]
    # Self-attention, attn1, comes before cross-attention, attn2, in the block that both share.
    last = max([*cross, *own], key=lambda name: (name.split(".")[0], name))
    words = words.to(latent.device, torch.float32)
    taps = {
        f"{name}.processor": TapWords(
            original[f"{name}.processor"], level_of(name, num_blocks), words, found, name == last
        )
        for name in cross
    } | {f"{name}.processor": TapQueries(original[f"{name}.processor"], found, name == last) for name in own}
    unet.set_attn_processor(original | taps)
    try:
        with suppress(_AllAttended):
            unet(latent, timestep, encoder_hidden_states=context)
    finally:
        unet.set_attn_processor(original)  # an exception must not leave the U-Net instrumented
    return found
