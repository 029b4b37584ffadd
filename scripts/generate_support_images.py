"""Draw the auxiliary support images that a few-shot configuration reads (DifFSS, arXiv 2307.00773, stage A).

    python -m scripts.generate_support_images --config conf/mini/difffss_hsnet.yaml --folds 0 1 2 3
    python -m scripts.generate_support_images --config conf/difffss_pascal5i.yaml --data.fold 0 --control hed

Options that are not listed below (--data.fold 0) go to the configuration. Only the (image, class) pairs that
its episodes read are drawn, into ROOT/DATASET/CONTROL/PROFILE: the images, profile.yaml with all settings,
whose hash is the profile's name, and manifest.jsonl with a line for each image. What exists is kept. So a run
that was stopped goes on with the same command, and shards (of a SLURM array, or by --shard and --num-shards)
leave the same files together as one run.

Images are drawn in groups of 4 (k = 0..3, 4..7, ...), always whole ones, of which those below --num are kept:
so the bytes of an image do not depend on --num. The sheet is drawn by shard 0 alone, of all pairs that have
all images when it ends; its command once more, when all shards have ended, gives that of one run.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from cli import SegmentationCLI, build
from config_files import UsageError, read_yaml, set_environment, short_errors
from datamodules.auxiliary import Auxiliary, FewShotImages, auxiliary_file
from datamodules.mini_world.captions import article
from functional.ade20k import COLORS, WALL, ade_class
from functional.classes import MINI_OBJECTS
from functional.control_images import (
    edge_image,
    generation_size,
    hed_image,
    mask_image,
    resize_nearest,
    scribble_image,
    seg_image,
)
from functional.fingerprint import weights_sha256
from functional.support_images import profile_hash, support_name, support_seed
from mistakes import edge_errors
from models.difffss import SAMPLERS, SupportGenerator, hub_file, load_controlnet
from models.diffusion.stable_diffusion import DTYPES, StableDiffusion
from models.hed import HED, HUB, load_hed
from models.support_filters import ClipScore, SegmenterAgreement
from scripts.gallery import grid, with_text
from scripts.support_image_files import write_image, write_manifest, write_text

CONTROLS = ("seg", "hed", "scribble", "mask", "edge")
# What is drawn by default for the published data sets, and for the mini world's.
PUBLISHED = {
    "base": "sd-1.5",
    "controlnet": "lllyasviel/sd-controlnet-{control}",
    "prompt_template": "a real shot photo of {name}, best quality, extremely detailed",
    "negative_prompt": "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, "
    "fewer digits, cropped, worst quality, low quality, artwork",
    "guidance": 9.0,
    "size": 512,
    "format": "jpg",
    "dtype": "float16",
}
MINI = {
    "base": "assets/mini-diffusion",
    "controlnet": "assets/mini-controlnet-{control}",
    "prompt_template": "a photo of {a_name}",
    "negative_prompt": "",
    "guidance": 9.0,
    "size": 64,
    "format": "png",
    "dtype": "float32",
}
# All further options that the images depend on.
SAMPLING = ("sampler", "steps", "control_scale", "control_end", "seed", "filter")
# Images that are drawn as one batch. The last bits of one depend on the size of its batch, so another number
# would change all images, and the profile's name would not tell.
GROUP = 4
TILE = 128  # side of a picture on the contact sheet


class Pair(NamedTuple):
    """A support that gets images: stem and class number in their names, and where its own image is."""

    stem: str
    number: int
    images: FewShotImages
    index: int
    class_id: int

    @property
    def name(self) -> str:
        """The class's name."""
        return self.images.class_names[self.class_id]


def needed_pairs(
    words: Sequence[str], folds: Sequence[int] | None, splits: Sequence[str]
) -> tuple[list[Pair], list[Auxiliary]]:
    """The pairs that a configuration reads, by stem and class number, none twice, and how it reads them.

    Args:
        words: of a command line, that name the configuration.
        folds: by which data.fold is replaced in turn; None takes it as it is.

    Raises:
        UsageError: its data has no few-shot episodes, or these read no generated images.
    """
    pairs: dict[tuple[str, int], Pair] = {}
    settings: list[Auxiliary] = []
    for extra in [[]] if folds is None else [["--data.fold", str(fold)] for fold in folds]:
        _, data = build({"data": SegmentationCLI([*words, *extra], build=False).resolved()["data"]})
        if not hasattr(data, "support_pairs"):
            raise UsageError(f"{type(data).__name__} has no few-shot episodes: give a config of DifFSS.")
        for split in splits:
            images = data.images(split)
            settings += [supports.aux for supports in data.generated(split)]
            for index, class_id in data.support_pairs(split):
                key = images.aux_key(index, class_id)
                pairs.setdefault(key, Pair(*key, images, index, class_id))
    if not pairs:
        raise UsageError(
            f"the episodes of {' and '.join(splits)} read no generated images.\n"
            "Set aux with source: generated in data.init_args.supports or eval_supports."
        )
    return [pairs[key] for key in sorted(pairs)], settings


class Drawing:
    """Draws the images of pairs by the settings of a profile.

    Args:
        settings: of the profile, see profile_settings.
        folder: of the images.
        hed: edge detector, for the controls hed and scribble.
        score: of (image [3, H, W], mask [H, W], class name), for the filter; None accepts all images.
    """

    def __init__(
        self,
        settings: dict,
        folder: Path,
        generator: SupportGenerator,
        hed: HED | None = None,
        score: Callable[[Tensor, Tensor, str], float] | None = None,
    ):
        self.settings, self.folder, self.generator = settings, folder, generator
        self.hed, self.score = hed, score

    def file(self, pair: Pair, k: int) -> Path | None:
        """The file of a pair's k-th image, or None."""
        return auxiliary_file(self.folder, pair.stem, pair.number, k)

    def control(self, pair: Pair) -> tuple[np.ndarray, Tensor, Tensor]:
        """At the size of drawing: support [H, W, 3], control [3, H, W] in [0, 1] and mask, bool [H, W]."""
        image, label = pair.images.read(pair.index)
        kind, short_side = self.settings["control"], self.settings["size"]
        size = generation_size(*label.shape, short_side, self.generator.diffusion.stride)
        mask = resize_nearest(torch.from_numpy(np.equal(label, pair.class_id)), size)
        method = cv2.INTER_LANCZOS4 if short_side > min(label.shape) else cv2.INTER_AREA
        image = cv2.resize(np.ascontiguousarray(image), size[::-1], interpolation=method)
        if kind == "seg":
            chosen = self.settings["ade_classes"]
            index = ade_class(pair.images.dataset, pair.class_id, pair.name, chosen)
            control = seg_image(mask, COLORS[index], COLORS[WALL])
        elif kind == "mask":
            control = mask_image(mask.long() * pair.class_id, MINI_OBJECTS.colors)
        elif kind == "edge":
            control = edge_image(mask.long())
        else:
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(self.hed.norm.device)
            edges = self.hed(pixels.float() / 255)[0].cpu()
            control = (hed_image if kind == "hed" else scribble_image)(edges, mask)
        return image, control[0], mask

    def draw(self, pair: Pair, ks: Sequence[int]) -> dict[int, tuple[np.ndarray, dict]]:
        """The pair's k-th images, uint8 [H, W, 3], with their records: the same ones whichever are asked for.

        Image k is always drawn in one batch with all of its group, GROUP * g .. GROUP * g + GROUP - 1, also
        where the others are not wanted: the last bits of one depend on the size of the batch.

        An image that the filter rejects is drawn again from the next seed, `retries` times; then the real
        support takes its place.
        """
        settings = self.settings
        real, control, mask = self.control(pair)
        a_name = article(pair.name)
        prompt = settings["prompt_template"].format(name=pair.name, a_name=a_name)
        key = (pair.images.dataset, pair.stem, pair.number)
        record = {
            "prompt": prompt,
            "height": control.shape[1],
            "width": control.shape[2],
            "control_sha256": hashlib.sha256(control.contiguous().numpy().tobytes()).hexdigest(),
            "profile": profile_hash(settings),
            "diffusers": version("diffusers"),
            "torch": torch.__version__,
        }
        rejected = real, {"seed": None, "accepted": False, "score": None}
        drawn = dict.fromkeys(ks, rejected)
        for first in sorted({k - k % GROUP for k in ks}):
            wanted = [k for k in ks if first <= k < first + GROUP]
            seeds = [support_seed(*key, k, settings["seed"]) for k in range(first, first + GROUP)]
            for attempt in range(1 + settings["retries"]):
                tried = [(seed + attempt) % 2**31 for seed in seeds]
                images = self.generator(prompt, settings["negative_prompt"], control, tried)
                for k in wanted:
                    image = images[k - first]
                    score = None if self.score is None else self.score(image, mask, pair.name)
                    if score is None or score >= settings["threshold"]:
                        pixels = image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
                        drawn[k] = pixels, {"seed": tried[k - first], "accepted": True, "score": score}
                wanted = [k for k in wanted if drawn[k] is rejected]
                if not wanted:
                    break
        name = {"stem": pair.stem, "class": pair.number}
        return {k: (pixels, {**name, "k": k, **own, **record}) for k, (pixels, own) in drawn.items()}

    def draw_missing(self, pairs: Sequence[Pair], num: int) -> None:
        """Draw and write those of the pairs' images that are not there."""
        lacking = {p: ks for p in pairs if (ks := [k for k in range(num) if self.file(p, k) is None])}
        with tqdm(total=sum(map(len, lacking.values())), desc="support images", unit="image") as bar:
            for pair, ks in lacking.items():
                for k, (pixels, record) in self.draw(pair, ks).items():
                    name = support_name(pair.stem, pair.number, k)
                    write_image(self.folder / f"{name}.{self.settings['format']}", pixels, record)
                    bar.update()

    def contact_sheet(self, pairs: Sequence[Pair], num: int, rows: int) -> np.ndarray:
        """A row for each of some pairs: the support, its mask outlined, the control, and the images.

        Pairs that lack images are left out; one at least must have all.
        """
        pairs = [pair for pair in pairs if all(self.file(pair, k) for k in range(num))]
        tiles = []
        for pair in pairs[:: -(-len(pairs) // rows)]:
            real, control, mask = self.control(pair)
            real[edge_image(mask.long())[0, 0].bool().numpy()] = (255, 0, 255)
            pictures = {
                pair.name: real,
                self.settings["control"]: (control * 255).byte().permute(1, 2, 0).numpy(),
            }
            pictures |= {
                str(k): np.asarray(Image.open(self.file(pair, k)).convert("RGB")) for k in range(num)
            }
            for title, picture in pictures.items():
                method = cv2.INTER_AREA if len(picture) > TILE else cv2.INTER_NEAREST
                tiles.append(with_text(cv2.resize(picture, (TILE, TILE), interpolation=method), title, 1))
        return grid(tiles, 2 + num)


def profile_settings(
    args: argparse.Namespace, generator: SupportGenerator, hed: HED | None, clip: nn.Module | None
) -> dict:
    """All that images depend on besides what each shows; the profile's name is a hash of it.

    What a filter alone reads has keys only where that filter is on.
    """
    diffusion, filtered = generator.diffusion, args.filter != "none"
    parts = {
        "unet": diffusion.unet,
        "vae_decoder": diffusion.vae.decoder,
        "text_encoder": diffusion.text_encoder,
        "controlnet": generator.controlnet,
        "hed": hed,
        "clip": clip,
    }
    if args.filter == "segmenter":
        parts["vae_encoder"] = nn.ModuleList([diffusion.vae.encoder, diffusion.vae.quant_conv])
    options = ("control", *PUBLISHED, *SAMPLING) + ("clip",) * (args.filter == "clip")
    return {key: getattr(args, key) for key in options} | {
        "ade_classes": args.ade_classes if args.control == "seg" else {},
        "threshold": args.threshold if filtered else None,
        "retries": args.retries if filtered else 0,
        "weights": {name: weights_sha256(part)[:12] for name, part in parts.items() if part is not None},
    }


def make_drawing(args: argparse.Namespace, dataset: str) -> Drawing:
    """Load the models that the options name, and leave their settings in the profile's folder.

    Raises:
        UsageError: other settings are there.
    """
    parts = ("unet", "vae_decoder", "text_encoder") + ("vae_encoder",) * (args.filter == "segmenter")
    diffusion = StableDiffusion(args.base, parts, args.dtype).to(args.device)
    controlnet = load_controlnet(args.controlnet, args.dtype).to(args.device)
    options = (args.sampler, args.steps, args.guidance, args.control_scale, args.control_end)
    generator, hed, score = SupportGenerator(diffusion, controlnet, *options), None, None
    if args.control in ("hed", "scribble"):
        hed = load_hed(args.hed or hub_file(*HUB)).to(args.device)
    if args.filter != "none":
        score = SegmenterAgreement(diffusion) if args.filter == "segmenter" else ClipScore(args.clip)
        score = score.to(args.device)
    settings = profile_settings(args, generator, hed, score.clip if args.filter == "clip" else None)
    folder = args.root / dataset / args.control / profile_hash(settings)
    path = folder / "profile.yaml"
    if path.is_file() and read_yaml(path) != settings:
        raise UsageError(f"{path} was changed: its settings are not those of its name.\nGive another --root.")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(settings))
    return Drawing(settings, folder, generator, hed, score)


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; the second result goes to the configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", type=Path, action="append", required=True, help="of a few-shot experiment; repeatable")
    add("--folds", type=int, nargs="+", help="for all of these (default: the configuration's fold)")
    splits = ("train", "val", "test")
    add("--split", nargs="+", choices=splits, default=splits, help="for the episodes of these (default: all)")
    add("--root", type=Path, help="folder of all profiles (default: where the configuration reads them)")
    add("--num", type=int, help="images of each pair (default: as many as the configuration reads)")
    add("--hed", type=Path, help="file ControlNetHED.pth (default: from the hub)")
    add("--sampler", choices=tuple(SAMPLERS), default="ddim")
    add("--steps", type=int, default=20)
    add("--control-scale", type=float, default=1.0)
    add("--control-end", type=float, default=1.0, help="share of the steps after which the control ends")
    add("--ade-classes", type=Path, help="JSON file {class name: index in ADE20K}, for the control seg")
    add("--seed", type=int, default=0)
    add("--filter", choices=("none", "segmenter", "clip"), default="none", help="what rejects images")
    add("--threshold", type=float, help="smallest accepted IoU (0.5), or cosine of CLIP (0.2)")
    add("--retries", type=int, default=3, help="new seeds before the real support takes an image's place")
    add("--clip", default="openai/clip-vit-base-patch32", help="model of the filter clip")
    add("--shard", type=int, help="from 0 (default: that of the SLURM array)")
    add("--num-shards", type=int, help="(default: those of the SLURM array, else 1)")
    add("--sheet", type=Path, help="picture with a row of support, control and images for some pairs")
    add("--sheet-rows", type=int, default=8)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group = parser.add_argument_group(
        "by default as fits the data set: the published one's, or the mini world's"
    )
    add = group.add_argument
    add("--control", choices=CONTROLS, help="(default: what the configuration reads)")
    add("--base", help="Stable Diffusion: folder in diffusers' layout, alias or hub name")
    add("--controlnet", help="folder in diffusers' layout or hub name; {control} stands for --control")
    add("--prompt-template", help="with {name}, or {a_name} for the name behind a or an")
    add("--negative-prompt")
    add("--guidance", type=float)
    add("--size", type=int, help="shorter side in pixels")
    add("--format", choices=("jpg", "png"))
    add("--dtype", choices=tuple(DTYPES))
    args, rest = parser.parse_known_args(argv)
    if args.shard is None and args.num_shards is None and "SLURM_ARRAY_TASK_COUNT" in os.environ:
        args.num_shards = int(os.environ["SLURM_ARRAY_TASK_COUNT"])
        args.shard = int(os.environ["SLURM_ARRAY_TASK_ID"]) - int(os.environ["SLURM_ARRAY_TASK_MIN"])
    args.shard, args.num_shards = args.shard or 0, args.num_shards or 1
    if not 0 <= args.shard < args.num_shards:
        parser.error(f"--shard counts from 0 to --num-shards - 1: found {args.shard} of {args.num_shards}.")
    if (args.num is not None and args.num < 1) or args.sheet_rows < 1 or args.retries < 0:
        parser.error("--num and --sheet-rows are at least 1, --retries at least 0.")
    for option, fields in (("prompt_template", ("name", "a_name")), ("controlnet", ("control",))):
        value = getattr(args, option)
        try:
            (value or "").format(**dict.fromkeys(fields, ""))
        except (LookupError, ValueError, TypeError, AttributeError):
            known = " or ".join(f"{{{field}}}" for field in fields)
            option = option.replace("_", "-")
            parser.error(f"--{option} has an unknown field in braces: found {value!r}. Use {known}.")
    if args.threshold is None:
        args.threshold = {"none": None, "segmenter": 0.5, "clip": 0.2}[args.filter]
    return args, rest


def fill_in(args: argparse.Namespace, dataset: str, settings: Sequence[Auxiliary]) -> None:
    """Set the options that were not given to what the configuration reads, or else to what fits a data set.

    Raises:
        UsageError: the configuration reads several kinds of images, and none was chosen; or the control is
            for the mini world's images alone.
    """
    for option in ("root", "control"):
        read = sorted({str(getattr(aux, option)) for aux in settings})
        if getattr(args, option) is None and len(read) > 1:
            raise UsageError(f"the configuration reads several: {', '.join(read)}.\nChoose by --{option}.")
        setattr(args, option, getattr(args, option) or read[0])
    if dataset != "mini20i" and (
        args.control == "mask" or (args.control == "edge" and args.controlnet is None)
    ):
        raise UsageError(
            f"--control {args.control} is for the mini world, whose class colours and ControlNet it takes: "
            f"found the data set {dataset}.\nChoose --control seg, hed or scribble, or edge with a "
            "--controlnet of your own."
        )
    args.root, args.num = Path(args.root), args.num or max(aux.num for aux in settings)
    if args.dtype is None and args.device == "cpu":
        args.dtype = "float32"  # half precision is slow there, or not to be had
    for option, value in (MINI if dataset == "mini20i" else PUBLISHED).items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    args.controlnet = args.controlnet.format(control=args.control)
    args.ade_classes = json.loads(args.ade_classes.read_text("utf-8")) if args.ade_classes else {}


def main(argv: list[str] | None = None) -> None:
    set_environment()
    args, rest = parse_args(argv)
    words = [word for path in args.config for word in ("--config", str(path))]
    with edge_errors():
        pairs, settings = needed_pairs([*words, *rest], args.folds, args.split)
        dataset = pairs[0].images.dataset
        fill_in(args, dataset, settings)
        drawing = make_drawing(args, dataset)
        own = pairs[args.shard :: args.num_shards]
        drawing.draw_missing(own, args.num)
        number = write_manifest(drawing.folder)
    print(f"{drawing.folder}: {number} images; {len(pairs)} pairs are read, {args.num} images of each.")
    if args.sheet and args.shard == 0:  # which has the first pair at least; shards may be more than pairs
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawing.contact_sheet(pairs, args.num, args.sheet_rows)).save(args.sheet)


if __name__ == "__main__":
    with short_errors():
        main()
