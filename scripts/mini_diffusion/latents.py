"""Latents and token ids of the training scenes, computed once: the U-Net's training never sees a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from functional.fingerprint import weights_sha256
from scripts.mini_diffusion.scenes import captioned_scenes, labelled_scenes, scenes_digest
from scripts.mini_diffusion.state import save_state

WHOLE_SHARE = 0.1  # of the batches
OBJECT_SHARE, SENSOR_SHARE = 0.7, 0.12  # of the other batches; what remains are street crops


@dataclass
class Latents:
    """Latents [N, 4, h, w] (fp16) and token ids [N, captions, tokens] of each kind of scene."""

    latent: dict[str, Tensor]
    tokens: dict[str, Tensor]
    empty: Tensor  # the tokens of the empty caption

    def batch(self, generator: np.random.Generator, batch: int, device: str) -> dict:
        """A batch of one resolution: "latent" [B, 4, h, w] float32 and "tokens" [B, tokens].

        One batch in ten holds whole street scenes (a quarter as many), the others mostly objects, because on
        those alone a caption tells what the noised picture does not, and crops of streets and sensors. One
        caption in ten is empty: classifier-free guidance needs it (arXiv 2207.12598, algorithm 1).
        """
        if generator.random() < WHOLE_SHARE:
            parts = {"whole": max(batch // 4, 1)}
        else:
            objects, sensors = round(OBJECT_SHARE * batch), round(SENSOR_SHARE * batch)
            parts = {"objects": objects, "sensors": sensors, "crops": batch - objects - sensors}
        latent, tokens = [], []
        for kind, count in parts.items():
            chosen = torch.from_numpy(generator.integers(len(self.latent[kind]), size=count))
            caption = torch.from_numpy(generator.integers(self.tokens[kind].shape[1], size=count))
            latent.append(self.latent[kind][chosen])
            tokens.append(self.tokens[kind][chosen, caption])
        latent, tokens = torch.cat(latent).float(), torch.cat(tokens).long()
        tokens[torch.from_numpy(generator.random(len(tokens)) < 0.1)] = self.empty.long()
        return {"latent": latent.to(device), "tokens": tokens.to(device)}


def tokenize(tokenizer, captions: Sequence[Sequence[str]]) -> Tensor:
    """Token ids [N, captions, tokens] as int16.

    Raises:
        ValueError: a caption is longer than the tokenizer's limit.
    """
    flat = [caption for several in captions for caption in several]
    ids = tokenizer(flat, padding="max_length", max_length=tokenizer.model_max_length)["input_ids"]
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) > tokenizer.model_max_length:
        raise ValueError(
            f"The caption {flat[longest]!r} has {len(ids[longest])} tokens, the tokenizer holds "
            f"{tokenizer.model_max_length}. Shorten the captions or raise NUM_TOKENS."
        )
    return torch.tensor(ids, dtype=torch.int16).view(len(captions), -1, tokenizer.model_max_length)


@torch.no_grad()
def encode(vae, pictures: Sequence[np.ndarray], device: str, batch: int = 64) -> Tensor:
    """Posterior means [N, 4, h, w] in fp16."""
    latents = []
    for start in tqdm(range(0, len(pictures), batch), desc="latents", unit="batch"):
        image = torch.from_numpy(np.stack(pictures[start : start + batch])).permute(0, 3, 1, 2)
        image = image.float().div(127.5).sub(1).to(device).contiguous(memory_format=torch.channels_last)
        latents.append(vae.encode(image).latent_dist.mean.half().cpu())
    return torch.cat(latents) * vae.config.scaling_factor


def cache_key(vae, tokenizer, scenes: int) -> str:
    """What cached latents depend on."""
    return f"{weights_sha256(vae)} {scenes} {len(tokenizer)} {scenes_digest()}"


def cached(path: Path, key: str, make: Callable[[], dict]) -> dict:
    """What `path` holds, if it was stored under this key; else what make() returns, stored there."""
    if path.exists():
        stored = torch.load(path, weights_only=True)
        if stored.pop("key") == key:
            return stored
    stored = make()
    save_state(path, stored | {"key": key})
    return stored


def cached_latents(vae, tokenizer, path: Path, scenes: int, device: str) -> Latents:
    """Encode the training scenes, or read them from `path` if nothing that they depend on has changed."""

    def make() -> dict:
        latent, tokens = {}, {}
        for kind, pairs in captioned_scenes(scenes).items():
            latent[kind] = encode(vae, [picture for picture, _ in pairs], device)
            tokens[kind] = tokenize(tokenizer, [captions for _, captions in pairs])
        return {"latent": latent, "tokens": tokens, "empty": tokenize(tokenizer, [[""]])[0, 0]}

    return Latents(**cached(path, cache_key(vae, tokenizer, scenes), make))


@dataclass
class LabelledLatents:
    """Object scenes: latents [N, 4, h, w] (fp16), token ids [N, captions, tokens], uint8 labels [N, H, W]."""

    latent: Tensor
    tokens: Tensor
    label: Tensor
    empty: Tensor  # the tokens of the empty caption

    def batch(self, generator: np.random.Generator, batch: int, empty_share: float, device: str) -> dict:
        """A batch: "latent" [B, 4, h, w] float32, "tokens" [B, tokens], "label" [B, H, W] int64.

        Args:
            empty_share: share of the captions that are empty, on average.
        """
        chosen = torch.from_numpy(generator.integers(len(self.latent), size=batch))
        caption = torch.from_numpy(generator.integers(self.tokens.shape[1], size=batch))
        tokens = self.tokens[chosen, caption].long()
        tokens[torch.from_numpy(generator.random(batch) < empty_share)] = self.empty.long()
        parts = {"latent": self.latent[chosen].float(), "tokens": tokens, "label": self.label[chosen].long()}
        return {name: part.to(device) for name, part in parts.items()}


def cached_labelled_latents(vae, tokenizer, path: Path, scenes: int, device: str) -> LabelledLatents:
    """Encode the object scenes, or read them from `path` if nothing that they depend on has changed."""

    def make() -> dict:
        pictures, captions, labels = zip(*labelled_scenes(scenes), strict=True)
        return {
            "latent": encode(vae, pictures, device),
            "tokens": tokenize(tokenizer, captions),
            "label": torch.from_numpy(np.stack(labels)),
            "empty": tokenize(tokenizer, [[""]])[0, 0],
        }

    return LabelledLatents(**cached(path, cache_key(vae, tokenizer, scenes), make))
