"""From the attention of a U-Net to one map per word: fusion over its levels and completion by self-attention.

DiffSegmenter (arXiv 2309.02773): the cross-attention of a word says where it is, the self-attention of the
finest level what belongs together. Sizes come from the latent, so that other models and images that are not
square work too.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Share of the levels from fine to coarse, which is 64, 32, 16 and 8 in Stable Diffusion at 512 pixels.
LEVEL_WEIGHTS = (0.1, 0.1, 0.5, 0.3)


def level_of(layer: str, num_blocks: int = 4) -> int:
    """Level of an attention layer by its name: 0 has the latent's size, each next one half of it.

    By name and not by the number of queries, which is ambiguous where an image is not square.

    Raises:
        ValueError: not a layer of a U-Net's blocks.
    """
    block, _, index = layer.partition(".")
    index = index.split(".")[0]
    if block == "mid_block":
        return num_blocks - 1
    if block in ("down_blocks", "up_blocks") and index.isdecimal() and int(index) < num_blocks:
        return int(index) if block == "down_blocks" else num_blocks - 1 - int(index)
    raise ValueError(
        f"{layer!r} is in no level of a U-Net with {num_blocks} blocks: give names as attention_layers lists "
        "them, such as 'up_blocks.1.attentions.0.transformer_blocks.0.attn2'."
    )


def level_size(size: tuple[int, int], level: int) -> tuple[int, int]:
    """Height and width of a level; a downsampler rounds up."""
    return -(-size[0] >> level), -(-size[1] >> level)


def mean_by_level(attention: Mapping[str, Tensor], num_blocks: int = 4) -> dict[int, Tensor]:
    """Mean over all heads of all layers of a level, in float32.

    Args:
        attention: probabilities [B, heads, queries, keys] by layer, as record_attention stores them.

    Returns:
        {level: [B, queries, keys]}, fine to coarse; M_r of the cross-attention, S of the self-attention.
    """
    layers = defaultdict(list)
    for layer, weights in attention.items():
        layers[level_of(layer, num_blocks)].append(weights.float())
    return {level: torch.cat(layers[level], dim=1).mean(1) for level in sorted(layers)}


def word_map(attention: Tensor, tokens: Sequence[Sequence[int]], size: tuple[int, int]) -> Tensor:
    """Mean attention [B, h, w] to the tokens of a word (a_c,r).

    Args:
        attention: [B, h * w, keys] of one level.
        tokens: for each of the B prompts the positions of its word.
        size: (h, w) of the level.
    """
    columns = [one[:, list(word)].mean(1) for one, word in zip(attention, tokens, strict=True)]
    return torch.stack(columns).unflatten(1, size)


def stretch(maps: Tensor) -> Tensor:
    """Min-max normalise each map [..., h, w] to [0, 1]; a constant map, which says nothing, becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0)


def fuse_levels(
    maps: Mapping[int, Tensor], size: tuple[int, int], weights: Sequence[float] = LEVEL_WEIGHTS
) -> Tensor:
    """Weighted sum F_c [B, h, w] of a word's maps, each resized to `size` and then stretched to [0, 1].

    Args:
        maps: {level: [B, h, w]}.
        size: of the finest level, the latent's.
        weights: of the levels, fine to coarse.

    Raises:
        ValueError: a level has no weight.
    """
    if missing := [level for level in maps if level >= len(weights)]:
        raise ValueError(f"Levels {missing} have no weight: found {len(weights)} weights. Give one for each.")
    fused = 0
    for level, one in maps.items():
        resized = F.interpolate(one[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        fused = fused + weights[level] * stretch(resized)
    return fused


def complete(self_attention: Tensor, fused: Tensor) -> Tensor:
    """One product G_c = S F_c: each place takes the mean of the map over the places that it attends to.

    Args:
        self_attention: S [B, h * w, h * w], rows (queries) sum to 1.
        fused: F_c [B, h, w].

    Returns:
        [B, h, w].
    """
    return (self_attention @ fused.flatten(1)[..., None]).view_as(fused)


def complete_by_layers(layers: Sequence[tuple[Tensor, Tensor]], fused: Tensor, power: int = 1) -> Tensor:
    """S^p F_c without building S: each layer attends to the map as its value, its share of S F_c.

    Args:
        layers: queries and keys [B, heads, h * w, width] of each self-attention layer of the finest level;
            S is the mean over all heads of all layers.
        fused: F_c [B, h, w].
        power: p; 0 returns the map as it is.

    Returns:
        [B, h, w], float32.
    """
    fused = fused.float()
    for _ in range(power):
        total, heads = 0, 0
        # Rows of S sum to 1. Without the mean half precision resolves what is left of a map that S spreads.
        mean = fused.mean((-2, -1), keepdim=True)
        column = (fused - mean).flatten(1)[:, None, :, None]
        for query, key in layers:
            # As wide as the keys, and in memory: kernels that never build the probabilities want both.
            value = column.to(query.dtype).expand_as(key).contiguous()
            found = F.scaled_dot_product_attention(query, key, value)[..., 0]  # [B, heads, h * w]
            total = total + found.sum(1, dtype=torch.float32)
            heads += query.shape[1]
        fused = (total / heads).view_as(fused) + mean
    return fused


def sharpen(maps: Tensor, gain: float, centre: float) -> Tensor:
    """Contrast of maps [..., h, w] in [0, 1]: sigmoid(gain (v - centre)), stretched to [0, 1] again."""
    return stretch(torch.sigmoid(gain * (maps - centre)))
