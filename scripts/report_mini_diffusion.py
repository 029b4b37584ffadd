"""Measure the mini diffusion model on held-out scenes: autoencoder, linear probe, use of captions, samples.

    python -m scripts.report_mini_diffusion --model assets/mini-diffusion --output docs/mini_diffusion

Writes report.json, report.md and pictures. Scenes are of the splits `val` (to fit the probe) and `test`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from callbacks.pictures import to_uint8
from callbacks.run_record import write_atomically
from datamodules.mini_world.captions import object_caption
from datamodules.mini_world.objects import render_objects
from datamodules.mini_world.street import CONDITIONS, render_street
from functional.classes import DELIVER11
from lightning_modules.metrics import ConfusionMatrix
from models.diffusion.stable_diffusion import StableDiffusion
from scripts.gallery import enlarge, grid

PROMPTS = (
    "a photo of a red car on grass",
    "a photo of a blue fish on sand",
    "a photo of a yellow star on wood",
    "a photo of a green tree on snow",
    "a photo of an orange cat on water",
    "a photo of a white house on grass",
    "a photo of a red heart and a blue boat on snow",
    "a photo of a street with a road and a building",
)


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] pictures to [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def to_pictures(images: Tensor) -> list[np.ndarray]:
    """[N, 3, H, W] in [0, 1] to uint8 [H, W, 3] pictures."""
    return [to_uint8(image) for image in images]


def street_scenes(
    split: str, count: int, first: int = 0, condition: str | None = None
) -> tuple[Tensor, Tensor]:
    """Real-style street scenes: images [N, 3, 128, 128] in [0, 1], labels [N, 128, 128]."""
    scenes = [render_street(split, first + i, condition=condition) for i in range(count)]
    label = torch.from_numpy(np.stack([s["label"] for s in scenes])).long()
    return to_tensor([s["rgb"] for s in scenes]), label


# ------------------------------------------------------------------------------------------------ autoencoder


def saturation(image: Tensor) -> float:
    """Mean over the pixels of [N, 3, H, W] of the largest minus the smallest channel."""
    return (image.amax(1) - image.amin(1)).mean().item()


def autoencoder_report(diffusion: StableDiffusion, images: Tensor) -> tuple[dict, Tensor]:
    """PSNR in dB over all pixels, the share of the mean saturation that is kept, and the reconstructions."""
    output = torch.cat([diffusion.decode(diffusion.encode(part)) for part in images.split(16)]).clamp(0, 1)
    psnr = -10 * torch.log10(F.mse_loss(output, images)).item()
    return {"psnr_db": psnr, "saturation_kept": saturation(output) / saturation(images)}, output


# ----------------------------------------------------------------------------------------------- linear probe


def probe_features(diffusion: StableDiffusion, images: Tensor, timestep: int, seed: int) -> Tensor:
    """Outputs of the four decoder blocks under the empty caption, at the latent's size: [N, C, h, w]."""
    generator, features = torch.Generator().manual_seed(seed), []
    with torch.no_grad():
        for part in images.split(8):
            latent = diffusion.encode(part)
            noised = diffusion.add_noise(latent, torch.randn(latent.shape, generator=generator), timestep)
            taps = diffusion.features(noised, timestep, diffusion.encode_text([""]), taps=(2, 5, 8, 11))
            sized = [F.interpolate(tap, latent.shape[-2:], mode="bilinear") for tap in taps]
            features.append(torch.cat(sized, 1))
    return torch.cat(features)


def linear_probe(train: tuple[Tensor, Tensor], test: list[tuple[Tensor, Tensor]], seed: int) -> list[float]:
    """Fit one linear layer per pixel and return the mIoU in percent on each test set.

    Args:
        train, test: features [N, C, h, w] and labels [N, H, W] with ids of deliver11; labels are read at the
            features' size (nearest).
        seed: of the layer's start and the order of the pixels.
    """

    def pixels(features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        small = F.interpolate(label[:, None].float(), features.shape[-2:], mode="nearest")
        return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]), small.long().reshape(-1)

    generator = torch.Generator().manual_seed(seed)
    x, y = pixels(*train)
    mean, std = x.mean(0), x.std(0) + 1e-6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = torch.nn.Linear(x.shape[1], len(DELIVER11))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for _ in range(400):
        chosen = torch.randint(len(x), (4096,), generator=generator)
        loss = F.cross_entropy(layer((x[chosen] - mean) / std), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = []
    for features, label in test:
        matrix = ConfusionMatrix(len(DELIVER11))
        x, y = pixels(features, label)
        with torch.no_grad():
            matrix.update(layer((x - mean) / std).argmax(1), y)
        scores.append(matrix.compute()["mIoU"].item())
    return scores


def probe_report(diffusion: StableDiffusion, scenes: int, seed: int, timestep: int = 100) -> dict[str, float]:
    """Fit a probe on street scenes of `val` and score it on `scenes` test scenes per condition.

    Returns:
        mIoU in percent by condition, and "mixed": each scene in its own condition (day 40 %, others 15 %).
    """
    image, label = street_scenes("val", 4 * scenes, first=10_000 * seed)
    train = probe_features(diffusion, image, timestep, seed), label
    test = []
    for condition in (*CONDITIONS, None):
        image, label = street_scenes("test", scenes, condition=condition)
        test.append((probe_features(diffusion, image, timestep, seed + 1), label))
    return dict(zip((*CONDITIONS, "mixed"), linear_probe(train, test, seed), strict=True))


# --------------------------------------------------------------------------------------------------- captions


def caption_losses(diffusion: StableDiffusion, scenes: int, timesteps: tuple[int, ...], seed: int) -> dict:
    """Denoising loss on object scenes with the right, an empty and another scene's caption, per timestep.

    Returns:
        {"t150_right": mean squared error of the predicted noise, "t150_empty": ..., "t150_wrong": ..., ...}
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    drawn = [render_objects("test", i) for i in range(scenes)]
    captions = [object_caption(scene["caption_facts"], rng) for scene in drawn]
    latent = torch.cat([diffusion.encode(part) for part in to_tensor([s["rgb"] for s in drawn]).split(32)])
    texts = {"right": captions, "empty": [""] * scenes, "wrong": captions[1:] + captions[:1]}
    losses = {}
    for timestep in timesteps:
        noise = torch.randn(latent.shape, generator=generator)
        noised = diffusion.add_noise(latent, noise, timestep)
        for kind, text in texts.items():
            context = diffusion.encode_text(text)
            with torch.no_grad():
                pairs = zip(noised.split(32), context.split(32), strict=True)
                predicted = torch.cat([diffusion.predict_noise(x, timestep, c) for x, c in pairs])
            losses[f"t{timestep}_{kind}"] = F.mse_loss(predicted, noise).item()
    return losses


def sample_grid(folder: Path, guidances: tuple[float, ...], seed: int, size: int = 64) -> np.ndarray:
    """Samples drawn by diffusers' own pipeline: a row per guidance scale, a column per prompt."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    tiles = []
    for guidance in tqdm(guidances, desc="samples"):
        images = pipeline(
            list(PROMPTS),
            height=size,
            width=size,
            num_inference_steps=30,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images
        tiles += [(image * 255).round().astype(np.uint8) for image in images]
    return enlarge(grid(tiles, len(PROMPTS), gap=0), 2)


def markdown(report: dict) -> str:
    """The report as a two-column table."""
    lines = ["| measure | value |", "|--|--|"]
    for section, values in report.items():
        for name, value in values.items():
            lines.append(f"| {section} {name} | {value:.4g} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("assets/mini-diffusion"))
    parser.add_argument("--output", type=Path, default=Path("docs/mini_diffusion"))
    parser.add_argument("--scenes", type=int, default=64, help="test scenes per kind and condition")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of probe, noise and untrained weights"
    )
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    parts = ("unet", "vae_encoder", "vae_decoder", "text_encoder")
    diffusion = StableDiffusion(str(args.model), parts=parts)

    report = {}
    street, _ = street_scenes("test", args.scenes)
    objects = to_tensor([render_objects("test", i)["rgb"] for i in range(args.scenes)])
    for kind, images in (("street", street), ("objects", objects)):
        report[f"autoencoder {kind}"], output = autoencoder_report(diffusion, images)
        tiles = to_pictures(torch.cat([images[:10], output[:10]]))
        sheet = enlarge(grid(tiles, len(tiles) // 2, gap=0), 1 if kind == "street" else 2)
        Image.fromarray(sheet).save(args.output / f"autoencoder_{kind}.png")
    for seed in tqdm(args.seeds, desc="probe"):
        untrained = StableDiffusion(str(args.model), untrained_seed=seed)
        report[f"probe trained seed {seed}"] = probe_report(diffusion, args.scenes, seed)
        report[f"probe untrained seed {seed}"] = probe_report(untrained, args.scenes, seed)
    report["captions"] = caption_losses(diffusion, args.scenes * 2, (150, 350, 550, 750), args.seeds[0])
    Image.fromarray(sample_grid(args.model, (1.0, 4.0, 7.5), args.seeds[0])).save(args.output / "samples.png")
    write_atomically(args.output / "report.json", json.dumps(report, indent=2) + "\n")
    write_atomically(args.output / "report.md", markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
