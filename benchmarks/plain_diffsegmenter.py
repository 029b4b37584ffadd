"""DiffSegmenter's score maps in the order of the released code (arXiv 2309.02773): what must be equalled.

One class after the other: its prompt and the empty one are encoded, and both go through the whole U-Net as
the two rows of one call, at whose end the empty prompt's row and the noise prediction are thrown away. All
layers build their attention probabilities, which are kept for both rows until the class is done. Those of the
finest self-attention layers are joined and averaged to one map [h * w, h * w], by which the class's map is
multiplied. (What only costs is left out: a second concatenation and average, copies of the maps, the product
on the CPU, maps that are resized as three equal channels.)
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

from functional.attention_maps import level_of
from functional.noise import named_noise
from models.diffsegmenter import DiffSegmenter
from models.diffusion.stable_diffusion import StableDiffusion
from models.prompts import Prompt


@torch.no_grad()
def plain_maps(network: DiffSegmenter, image: Tensor, name: str, words: list[str]) -> Tensor:
    """As DiffSegmenter.score_maps without captions, for one timestep and noise and all else as published."""
    diffusion, timestep = network.diffusion, network.timesteps[0]
    latent = network.encode(image, name)
    noised = diffusion.add_noise(latent, named_noise([name], latent.shape[1:], network.seed), timestep)
    maps = []
    for prompt in network.prompts(words):
        text = plain_text(network, prompt)
        completed = plain_map(diffusion, noised, timestep, text, prompt.tokens, network.level_weights)
        large = F.interpolate(completed, image.shape[-2:], mode="bilinear", align_corners=False)
        maps.append(min_max(large)[0, 0])
    return torch.stack(maps)


def plain_text(network: DiffSegmenter, prompt: Prompt) -> Tensor:
    """Embeddings [2, tokens, width] of the empty prompt and of a class's, the latter emphasised."""
    network.diffusion.text_cache.clear()
    empty, text = network.diffusion.encode_text(["", prompt.text])
    chosen = list(prompt.emphasized)
    text[chosen] = empty[chosen] + network.prompt.emphasis * (text[chosen] - empty[chosen])
    return torch.stack([empty, text])


def plain_map(
    diffusion: StableDiffusion,
    noised: Tensor,
    timestep: int,
    text: Tensor,
    tokens: tuple[int, ...],
    weights: tuple[float, ...],
) -> Tensor:
    """Completed map [1, 1, h, w] of a class by the attention of one U-Net call.

    Args:
        noised: latent [1, C, h, w]. text: see plain_text. tokens: positions whose attention counts.
        weights: of the levels, fine to coarse.
    """
    unet, kept = diffusion.unet, {}
    original = dict(unet.attn_processors)
    unet.set_attn_processor({name: KeepAttention(name, kept) for name in original})
    try:
        unet(*diffusion.unet_arguments(noised.expand(2, -1, -1, -1), timestep, text))
    finally:
        unet.set_attn_processor(original)
    height, width = noised.shape[-2:]
    fused = 0
    for level, weight in enumerate(weights):
        cross = mean_attention(kept, "attn2", level, len(unet.up_blocks))
        small = cross[:, list(tokens)].float().mean(1).view(1, 1, -(-height >> level), -(-width >> level))
        resized = F.interpolate(small, (height, width), mode="bilinear", align_corners=False)
        fused = fused + weight * min_max(resized)
    own = mean_attention(kept, "attn1", 0, len(unet.up_blocks)).float()
    return (own @ fused.flatten()).view(1, 1, height, width)


def mean_attention(kept: dict[str, Tensor], kind: str, level: int, num_blocks: int) -> Tensor:
    """Mean [queries, keys] of the class's row over all heads of a level's layers, in the network's dtype."""
    chosen = [name for name in kept if f".{kind}." in name and level_of(name, num_blocks) == level]
    return torch.cat([kept[name].chunk(2)[1] for name in chosen]).mean(0)


def min_max(maps: Tensor) -> Tensor:
    return (maps - maps.min()) / (maps.max() - maps.min())


class KeepAttention:
    """Attention processor that builds the probabilities, keeps them and attends by them."""

    def __init__(self, name: str, kept: dict[str, Tensor]):
        self.name, self.kept = name, kept

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        query, key, value = (attn.head_to_batch_dim(part) for part in projected)
        scores = (attn.scale * query) @ key.mT  # [2 * heads, queries, keys]
        self.kept[self.name] = scores.softmax(-1)
        del scores
        attended = attn.batch_to_head_dim(self.kept[self.name] @ value)
        return attn.to_out[1](attn.to_out[0](attended))
