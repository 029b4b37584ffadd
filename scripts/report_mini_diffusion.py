"""Measure the mini diffusion model and its ControlNets on held-out scenes.

    python -m scripts.report_mini_diffusion --model assets/mini-diffusion --output docs/mini_diffusion

Writes report.json, report.md and pictures: autoencoder, linear probe, use of captions, attention as masks,
inversion, samples and what they show. Scenes are of the splits `val` (for what is fitted or chosen) and
`test`; intervals hold 95 % of resampled sets of scenes. --sections measures a part again and keeps the rest.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
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
from models.diffusion.inversion import PATHS, follow
from models.diffusion.stable_diffusion import StableDiffusion
from scripts.gallery import enlarge, grid
from scripts.mini_diffusion.attention_report import (
    attention_sheet,
    object_attention_report,
    street_attention_report,
)
from scripts.mini_diffusion.intervals import Interval, bootstrap
from scripts.mini_diffusion.judges import score_judges, train_judges
from scripts.mini_diffusion.samples import (
    Samples,
    draw,
    sample_controlled,
    sample_objects,
    score_controlled,
    score_samples,
)
from scripts.mini_diffusion.scenes import to_tensor
from scripts.mini_diffusion.state import weights_fingerprint
from scripts.train_mini_controlnet import CONTROLS

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


def caption_losses(
    diffusion: StableDiffusion, scenes: int, timesteps: tuple[int, ...], seeds: Sequence[int]
) -> dict:
    """Denoising loss on object scenes with the right, an empty and another scene's caption, per timestep.

    Returns:
        {"t 150 right": mean squared error of the predicted noise, "t 150 empty": ..., "t 150 wrong": ...,
        "t 150 right below empty %": an interval, ...}, means over scenes and noise seeds.
    """
    rng = np.random.default_rng(0)
    drawn = [render_objects("test", i) for i in range(scenes)]
    captions = [object_caption(scene["caption_facts"], rng) for scene in drawn]
    latent = torch.cat([diffusion.encode(part) for part in to_tensor([s["rgb"] for s in drawn]).split(32)])
    texts = {"right": captions, "empty": [""] * scenes, "wrong": captions[1:] + captions[:1]}
    report = {}
    for timestep in tqdm(timesteps, desc="captions"):
        errors = np.zeros((scenes, len(texts)))
        for seed, (column, text) in product(seeds, enumerate(texts.values())):
            generator = torch.Generator().manual_seed(1000 * seed + timestep)
            noise = torch.randn(latent.shape, generator=generator)
            noised = diffusion.add_noise(latent, noise, timestep)
            pairs = zip(noised.split(32), diffusion.encode_text(text).split(32), strict=True)
            with torch.no_grad():
                predicted = torch.cat([diffusion.predict_noise(x, timestep, c) for x, c in pairs])
            errors[:, column] += (predicted - noise).square().mean((1, 2, 3)).numpy() / len(seeds)
        means = zip(texts, errors.mean(0).tolist(), strict=True)
        report |= {f"t {timestep} {kind}": mean for kind, mean in means}
        for column, other in enumerate(texts):
            if other != "right":
                report[f"t {timestep} right below {other} %"] = bootstrap(
                    errors, statistic=lambda mean, i=column: 100 * (1 - mean[..., 0] / mean[..., i])
                )
    return report


# -------------------------------------------------------------------------------------------------- inversion


@torch.no_grad()
def inversion_report(
    diffusion: StableDiffusion, images: Tensor, steps: int = 37
) -> dict[str, float | Interval]:
    """Follow DIFF's path from step 0 up and back: ||z' - z|| / ||z|| of the latents in percent."""
    times = (0, *PATHS[steps].targets)
    errors = []
    for part in tqdm(images.split(16), desc="inversion"):
        latent = diffusion.encode(part)
        empty = diffusion.encode_text([""])

        def predict(x: Tensor, timestep: int, empty: Tensor = empty) -> Tensor:
            return diffusion.predict_noise(x, timestep, empty)

        up = follow(latent, times, diffusion.alpha_bars, predict)[-1]
        back = follow(up, times[::-1], diffusion.alpha_bars, predict)[-1]
        errors.append(100 * (back - latent).flatten(1).norm(dim=1) / latent.flatten(1).norm(dim=1))
    error = torch.cat(errors)
    return {"mean error %": bootstrap(error.numpy()), "worst error %": error.max().item()}


# ---------------------------------------------------------------------------------------------------- samples


def sample_grid(folder: Path, guidances: tuple[float, ...], seed: int) -> np.ndarray:
    """Samples drawn by diffusers' own pipeline: a row per guidance scale, a column per prompt."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    tiles = []
    for guidance in guidances:
        tiles += to_pictures(draw(pipeline, list(PROMPTS), guidance, [seed]))
    return enlarge(grid(tiles, len(PROMPTS), gap=0), 2)


def control_grid(samples: dict[str, Samples], columns: int) -> np.ndarray:
    """Per kind of control a row of control pictures and a row of what was drawn from them."""
    tiles = []
    for kind, drawn in samples.items():
        tiles += to_pictures(CONTROLS[kind](drawn.label[:columns])) + to_pictures(drawn.image[:columns])
    return enlarge(grid(tiles, columns, gap=0), 2)


# ----------------------------------------------------------------------------------------------------- report


def held_out_images(scenes: int) -> dict[str, Tensor]:
    """The first test scenes of both kinds, [N, 3, H, W] in [0, 1]."""
    objects = to_tensor([render_objects("test", i)["rgb"] for i in range(scenes)])
    return {"street": street_scenes("test", scenes)[0], "objects": objects}


def autoencoder_section(args, diffusion: StableDiffusion) -> dict:
    """Both kinds of scenes, each with a sheet of originals and reconstructions."""
    report = {}
    for kind, images in held_out_images(args.scenes).items():
        report[kind], output = autoencoder_report(diffusion, images)
        tiles = to_pictures(torch.cat([images[:10], output[:10]]))
        sheet = enlarge(grid(tiles, len(tiles) // 2, gap=0), 1 if kind == "street" else 2)
        Image.fromarray(sheet).save(args.output / f"autoencoder_{kind}.png")
    return report


def probe_section(args, diffusion: StableDiffusion) -> dict:
    """Trained and untrained features, a row per seed."""
    report = {}
    for seed in tqdm(args.seeds, desc="probe"):
        untrained = StableDiffusion(str(args.model), untrained_seed=seed)
        report[f"trained, seed {seed}"] = probe_report(diffusion, args.scenes, seed)
        report[f"untrained, seed {seed}"] = probe_report(untrained, args.scenes, seed)
    return report


def captions_section(args, diffusion: StableDiffusion) -> dict:
    """Objects and the use of their captions."""
    return {"objects": caption_losses(diffusion, 4 * args.scenes, (150, 350, 550, 750), args.seeds)}


def attention_section(args, diffusion: StableDiffusion) -> dict:
    """Objects with the trained and an untrained U-Net, streets by class; a picture of some objects."""
    parts = ("unet", "vae_encoder", "text_encoder")
    untrained = StableDiffusion(str(args.model), parts=parts, untrained_seed=args.seeds[0])
    report = {}
    for name, model in (("trained", diffusion), ("untrained", untrained)):
        found = object_attention_report(model, 2 * args.scenes, args.seeds)
        report |= {f"objects, {kind}, {name}": values for kind, values in found.items()}
    report["streets"] = street_attention_report(diffusion, args.scenes // 2, args.seeds)
    Image.fromarray(attention_sheet(diffusion, 8, args.seeds[0])).save(args.output / "attention.png")
    return report


def inversion_section(args, diffusion: StableDiffusion) -> dict:
    """Both kinds of scenes along DIFF's longest path."""
    images = held_out_images(args.scenes)
    return {kind: inversion_report(diffusion, image) for kind, image in images.items()}


def samples_section(args, diffusion: StableDiffusion) -> dict:
    """What a classifier of real scenes finds in the samples at guidance 4 and 7.5, and a grid of prompts."""
    Image.fromarray(sample_grid(args.model, (1.0, 4.0, 7.5), args.seeds[0])).save(args.output / "samples.png")
    classifier, segmenter = train_judges(args.judges)

    @torch.no_grad()
    def round_trip(image: Tensor) -> Tensor:
        parts = (diffusion.decode(diffusion.encode(part)) for part in image.split(32))
        return torch.cat([part.clamp(0, 1) for part in parts])

    report = {
        "judges, real scenes": score_judges(classifier, segmenter),
        "judges, scenes through the autoencoder": score_judges(classifier, segmenter, change=round_trip),
    }
    for guidance in (4.0, 7.5):
        drawn = sample_objects(args.model, args.samples, guidance, args.seeds)
        report[f"guidance {guidance:g}"] = score_samples(classifier, drawn)
    return report


def controlnet_folder(model: Path, kind: str) -> Path:
    """Where the ControlNet of a kind lies: beside the model."""
    return model.with_name(f"mini-controlnet-{kind}")


def control_section(args, diffusion: StableDiffusion) -> dict:
    """Whether the object drawn with a ControlNet fills its control mask, and a grid of both kinds."""
    _, segmenter = train_judges(args.judges)
    folders = {kind: controlnet_folder(args.model, kind) for kind in CONTROLS}
    drawn = {
        kind: sample_controlled(args.model, folder, kind, args.samples, 4.0, args.seeds)
        for kind, folder in folders.items()
    }
    Image.fromarray(control_grid(drawn, 10)).save(args.output / "control.png")
    return {
        kind: {"of": weights_fingerprint(folders[kind]), **score_controlled(segmenter, samples)}
        for kind, samples in drawn.items()
    }


SECTIONS = {
    "autoencoder": autoencoder_section,
    "probe": probe_section,
    "captions": captions_section,
    "attention": attention_section,
    "inversion": inversion_section,
    "samples": samples_section,
    "control": control_section,
}


def show(value: str | float | Interval) -> str:
    """A value for the table; an interval as "mean (low to high)"."""
    if isinstance(value, dict):
        return "{mean:.4g} ({low:.4g} to {high:.4g})".format(**value)
    return value if isinstance(value, str) else f"{value:.4g}"


def markdown(report: dict) -> str:
    """The report as a table."""
    lines = ["| section | of | measure | value |", "|--|--|--|--|"]
    for section, parts in report.items():
        for part, values in parts.items():
            for name, value in values.items():
                lines.append(f"| {section} | {part} | {name} | {show(value)} |")
    return "\n".join(lines) + "\n"


def earlier_sections(path: Path, of: dict) -> dict:
    """The sections that a report in the place of the new one holds.

    Raises:
        ValueError: it was measured of other weights or scenes.
    """
    earlier = json.loads(path.read_text()) if path.exists() else {"of": of, "sections": {}}
    if earlier["of"] != of:
        raise ValueError(
            f"{path} was measured of {earlier['of']}, not of {of}. "
            "Give another --output, or delete that file."
        )
    return earlier["sections"]


def check_controlnet(model: Path, kind: str, weights: str) -> None:
    """Raise a ValueError unless the ControlNet beside a model was trained on its weights."""
    folder = controlnet_folder(model, kind)
    record = folder / "training.json"
    of = json.loads(record.read_text())["model"] if record.is_file() else "nothing"
    if of != weights:
        raise ValueError(
            f"{folder} holds a ControlNet of {of}, and the model has {weights}. Leave out the section "
            f"control, or train one: python -m scripts.train_mini_controlnet --kind {kind} "
            f"--model {model} --output {folder}"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("assets/mini-diffusion"))
    parser.add_argument("--output", type=Path, default=Path("docs/mini_diffusion"))
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        help="the others keep their figures",
    )
    parser.add_argument(
        "--scenes",
        type=int,
        default=64,
        help="test scenes per kind and condition; four times as many for captions and to fit the probe, "
        "twice as many for attention on objects, half on streets",
    )
    parser.add_argument(
        "--samples", type=int, default=260, help="generated pictures that are judged, at least 10"
    )
    parser.add_argument(
        "--judges", type=Path, default=Path("work/judges"), help="folder where the trained judges are kept"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of probe, noise and untrained weights"
    )
    args = parser.parse_args(argv)
    if args.scenes < 8 or args.samples < 10:
        parser.error(f"--scenes must be at least 8, --samples 10: found {args.scenes} and {args.samples}.")
    if not (args.model / "model_index.json").is_file():
        parser.error(f"--model {args.model} has no model_index.json: give a folder of train_mini_diffusion.")
    path = args.output / "report.json"
    of = {"weights": weights_fingerprint(args.model), "scenes": args.scenes, "seeds": args.seeds}
    of["samples"] = args.samples
    try:
        report = earlier_sections(path, of)
        for kind in CONTROLS if "control" in args.sections else ():
            check_controlnet(args.model, kind, of["weights"])
    except ValueError as error:
        parser.error(str(error))
    args.output.mkdir(parents=True, exist_ok=True)
    parts = ("unet", "vae_encoder", "vae_decoder", "text_encoder")
    diffusion = StableDiffusion(str(args.model), parts=parts)
    for section in args.sections:
        report[section] = SECTIONS[section](args, diffusion)
        report = {name: report[name] for name in SECTIONS if name in report}
        write_atomically(path, json.dumps({"of": of, "sections": report}, indent=2) + "\n")
        write_atomically(args.output / "report.md", markdown(report))
        print(markdown({section: report[section]}), flush=True)


if __name__ == "__main__":
    main()
