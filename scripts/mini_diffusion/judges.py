"""Two small networks that judge what the mini diffusion model draws, trained on real object scenes only.

One names the category and the colour of a single object, the other finds the pixels of all objects. Neither
sees a generated picture or an autoencoder in training: blurred copies of the real scenes prepare them for the
soft outlines that an autoencoder leaves.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from datamodules.mini_world.objects import CATEGORIES, COLORS, render_objects

SIZE = 64  # of the scenes, in pixels
# `scenes` of the split train with `count` objects each (None: 1..3).
RECIPES = {
    "classifier": {"scenes": 16_000, "count": 1, "steps": 1200, "batch": 32, "lr": 3e-3},
    "segmenter": {"scenes": 12_000, "count": None, "steps": 900, "batch": 16, "lr": 3e-3},
}


@dataclass
class Scenes:
    """N object scenes; category (0..25) and color (0..8) are those of the largest object."""

    image: Tensor  # uint8 [N, 3, 64, 64]
    label: Tensor  # uint8 [N, 64, 64]
    category: Tensor  # [N]
    color: Tensor  # [N]


def object_scenes(split: str, scenes: int, count: int | None) -> Scenes:
    """Render the first scenes of a split with `count` objects each; None varies it in 1..3."""
    drawn = [
        render_objects(split, i, size=SIZE, count=count)
        for i in tqdm(range(scenes), desc="scenes", leave=False)
    ]
    names, colors = zip(*(scene["objects"][0] for scene in drawn), strict=True)
    return Scenes(
        torch.from_numpy(np.stack([scene["rgb"] for scene in drawn])).permute(0, 3, 1, 2),
        torch.from_numpy(np.stack([scene["label"] for scene in drawn])),
        torch.tensor([CATEGORIES.index(name) for name in names]),
        torch.tensor([list(COLORS).index(color) for color in colors]),
    )


# --------------------------------------------------------------------------------------------------- networks


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class ObjectClassifier(nn.Module):
    """Category and colour of the one object in an image."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            block(3, 32, 2),
            block(32, 64, 2),
            block(64, 128, 2),
            block(128, 128),
            block(128, 192, 2),
            block(192, 192),
        )
        self.head = nn.Linear(2 * 192, len(CATEGORIES) + len(COLORS))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, 26] of the categories and [B, 9] of the colours of an image [B, 3, 64, 64] in [0, 1]."""
        features = self.body(2 * image - 1)
        logits = self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))
        return logits[:, : len(CATEGORIES)], logits[:, len(CATEGORIES) :]

    def loss(self, image: Tensor, scenes: Scenes, chosen: Tensor) -> Tensor:
        """Sum of the cross-entropies of both; image [B, 3, 64, 64] shows the chosen scenes [B]."""
        category, color = self(image)
        of_category = F.cross_entropy(category, scenes.category[chosen])
        return of_category + F.cross_entropy(color, scenes.color[chosen])

    @torch.no_grad()
    def name(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of category and colour, [N] each, on the CPU, of an image [N, 3, 64, 64] in [0, 1]."""
        logits = [self(part) for part in image.split(64)]
        category, color = (torch.cat(parts).argmax(1).cpu() for parts in zip(*logits, strict=True))
        return category, color


class ObjectSegmenter(nn.Module):
    """Pixels of objects, of whatever category: a U-Net of four levels that adds its skips."""

    WIDTHS = (32, 64, 96, 128)

    def __init__(self):
        super().__init__()
        # The stem takes and the head gives 2x2 pixels at each place: full resolution at the cost of half.
        self.stem = block(4 * 3, self.WIDTHS[0])
        pairs = list(zip(self.WIDTHS, self.WIDTHS[1:], strict=False))
        self.down = nn.ModuleList(
            nn.Sequential(block(fine, coarse, 2), block(coarse, coarse)) for fine, coarse in pairs
        )
        self.narrow = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in pairs)
        self.up = nn.ModuleList(block(fine, fine) for fine, _ in pairs)
        self.head = nn.Conv2d(self.WIDTHS[0], 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, H, W] of "object" of an image [B, 3, H, W] in [0, 1]; H and W are multiples of 16."""
        features = [self.stem(F.pixel_unshuffle(2 * image - 1, 2))]
        for down in self.down:
            features.append(down(features[-1]))
        x = features.pop()
        for narrow, up in zip(reversed(self.narrow), reversed(self.up), strict=True):
            x = up(F.interpolate(narrow(x), scale_factor=2.0) + features.pop())
        return F.pixel_shuffle(self.head(x), 2)[:, 0]

    def loss(self, image: Tensor, scenes: Scenes, chosen: Tensor) -> Tensor:
        """Binary cross-entropy over all pixels; image [B, 3, H, W] shows the chosen scenes [B]."""
        mask = (scenes.label[chosen] > 0).float()
        return F.binary_cross_entropy_with_logits(self(image), mask)

    @torch.no_grad()
    def find(self, image: Tensor) -> Tensor:
        """Masks of the objects, bool [N, H, W], on the CPU, of an image [N, 3, H, W] in [0, 1]."""
        return torch.cat([self(part) > 0 for part in image.split(64)])


# --------------------------------------------------------------------------------------------------- training


def blurred(image: Tensor, generator: torch.Generator) -> Tensor:
    """The images [B, 3, H, W], every second one shrunk to half of its side or more and enlarged again."""
    side = int(torch.randint(image.shape[-1] // 2, image.shape[-1], (), generator=generator))
    small = F.interpolate(image[::2], (side, side), mode="bilinear", antialias=True)
    image = image.clone()
    image[::2] = F.interpolate(small, image.shape[-2:], mode="bilinear")
    return image


def fit(judge: nn.Module, scenes: Scenes, steps: int, batch: int, lr: float, seed: int) -> nn.Module:
    """Train a judge on the scenes with AdamW under a one-cycle rate and leave it in eval mode."""
    judge.train().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    for _ in tqdm(range(steps), desc=type(judge).__name__, unit="step"):
        chosen = torch.randint(len(scenes.image), (batch,), generator=generator)
        image = blurred(scenes.image[chosen].float() / 255, generator)
        loss = judge.loss(image.to(memory_format=torch.channels_last), scenes, chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def recipe_key(kind: str, judge: nn.Module, seed: int) -> str:
    """What tells weights of another recipe, network, renderer or seed apart."""
    recipe, shapes = RECIPES[kind], {name: tuple(x.shape) for name, x in judge.state_dict().items()}
    digest = hashlib.sha256(json.dumps([recipe, shapes, seed]).encode())
    digest.update(render_objects("train", 0, size=SIZE, count=recipe["count"])["rgb"].tobytes())
    return digest.hexdigest()[:12]


def trained(kind: str, folder: Path, seed: int) -> ObjectClassifier | ObjectSegmenter:
    """Read a judge from the folder, or train it and leave it there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = {"classifier": ObjectClassifier, "segmenter": ObjectSegmenter}[kind]()
    path = folder / f"{kind}-{recipe_key(kind, judge, seed)}.safetensors"
    if path.exists():
        judge.load_state_dict(load_file(path))
        return judge.eval()
    recipe = dict(RECIPES[kind])
    scenes = object_scenes("train", recipe.pop("scenes"), recipe.pop("count"))
    fit(judge, scenes, **recipe, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({name: x.cpu().contiguous() for name, x in judge.state_dict().items()}, temporary)
    temporary.replace(path)
    return judge


def train_judges(folder: Path, seed: int = 0) -> tuple[ObjectClassifier, ObjectSegmenter]:
    """Both judges, in eval mode, and a line on what they reach on real held-out scenes.

    Args:
        folder: where trained weights are kept; those of the same recipe and seed are read instead of trained.
        seed: of the first weights and of the batches.
    """
    judges = trained("classifier", folder, seed), trained("segmenter", folder, seed)
    scores = ", ".join(f"{name} {value:.1f}" for name, value in score_judges(*judges).items())
    print(f"judges on held-out scenes: {scores}")
    return judges


# -------------------------------------------------------------------------------------------------- held out


def mask_iou(found: Tensor, mask: Tensor) -> Tensor:
    """Intersection over union in percent, [N], of masks [N, H, W]; 100 where both are empty."""
    both, either = (found & mask).sum((1, 2)), (found | mask).sum((1, 2))
    return torch.where(either > 0, 100 * both / either.clamp(min=1), 100.0)


def score_judges(
    classifier: ObjectClassifier,
    segmenter: ObjectSegmenter,
    scenes: int = 512,
    change: Callable[[Tensor], Tensor] = lambda image: image,
) -> dict[str, float]:
    """How well the judges do on real scenes of the split test.

    Args:
        change: what is done to an image [N, 3, 64, 64] in [0, 1] first, as an autoencoder's round trip.

    Returns:
        "category %", "color %": shares named right of scenes with one object; "object IoU %": mean over
        scenes with one to three.
    """
    single, several = object_scenes("test", scenes, 1), object_scenes("test", scenes, None)
    category, color = classifier.name(change(single.image.float() / 255))
    found = segmenter.find(change(several.image.float() / 255))
    return {
        "category %": 100 * (category == single.category).double().mean().item(),
        "color %": 100 * (color == single.color).double().mean().item(),
        "object IoU %": mask_iou(found, several.label > 0).double().mean().item(),
    }
