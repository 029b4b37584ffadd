r"""Train the mini Stable Diffusion on the mini world, from nothing, within a time budget.

    python -m scripts.train_mini_diffusion --minutes 90
    python -m scripts.train_mini_diffusion --minutes 60 --stages unet --lr 6e-4 \
        --init-from assets/mini-diffusion --work work/further

Stages: `vae` (autoencoder on both kinds of scenes, the other sensors and label palettes), `unet` (U-Net and
text encoder together on cached latents). State is saved every few minutes in --work; the same command goes
on from it, and one that would train something else is refused. The stage `unet` writes the result: a folder
in the layout of Stable Diffusion 1.x (diffusers) with fp16 safetensors of the EMA weights.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from scripts.mini_diffusion.latents import cached_latents
from scripts.mini_diffusion.layout import (
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    save_pipeline,
)
from scripts.mini_diffusion.loop import Clock, Log, Training, denoising_loss, step_generator
from scripts.mini_diffusion.scenes import vae_images
from scripts.mini_diffusion.state import check_state, identity, weights_fingerprint


def stage_minutes(args, stage: str) -> float:
    """What --minutes leaves for a stage: all of it where it is the only one."""
    share = args.vae_share if stage == "vae" else 1 - args.vae_share
    return args.minutes * (share if len(set(args.stages)) > 1 else 1)


# ------------------------------------------------------------------------------------------------ autoencoder


def reconstruction_loss(output: Tensor, image: Tensor) -> Tensor:
    """L1 and L2 weighted by saturation, chroma L1 and gradient L1; images [B, 3, H, W] in [-1, 1].

    Saturated pixels are few, and a plain L1 gives their colour up: yellow signs turn orange, green cars teal.
    """
    saturation = image.amax(1, keepdim=True) - image.amin(1, keepdim=True)
    weight = 1 + saturation
    difference = output - image
    chroma = (difference - difference.mean(1, keepdim=True)).abs()
    gradient = torch.diff(difference, dim=-1).abs().mean() + torch.diff(difference, dim=-2).abs().mean()
    pixel = weight * (difference.abs() + 5 * difference.square())
    return pixel.mean() + 2 * chroma.mean() + 0.25 * gradient


def train_vae(args, work: Path, log: Log) -> AutoencoderKL:
    """Train the x4 autoencoder on 64-px crops (without the stage `vae` only read it); the EMA weights."""
    torch.manual_seed(args.seed)
    vae = (
        build_vae()
        if args.init_from is None
        else AutoencoderKL.from_pretrained(args.init_from, subfolder="vae")
    )
    vae = vae.to(args.device, memory_format=torch.channels_last).train()
    clock, trained = Clock(stage_minutes(args, "vae") * 60), identity(args, "vae")
    training = Training(
        "vae", {"vae": vae}, 2e-3, clock, work / "vae.pt", trained, weight_decay=1e-4, warmup=100, decay=0.995
    )
    if "vae" in args.stages and not training.over():
        images = vae_images(work / "vae_images.npz")

        def forward(step: int) -> tuple[int, dict[str, Tensor]]:
            generator = np.random.default_rng((args.seed, step))
            image = images.crops(generator, batch=args.vae_batch, size=64).to(args.device).mul(2).sub(1)
            image = image.contiguous(memory_format=torch.channels_last)
            posterior = vae.encode(image).latent_dist
            output = vae.decode(posterior.sample(step_generator(args.seed, step))).sample
            loss = reconstruction_loss(output, image) + 1e-6 * posterior.kl().mean()
            return len(image), {"loss": loss, "squared error": (output - image).div(2).square().mean()}

        training.run(forward, log)
    return training.averages["vae"]


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold mean and deviation of each latent channel into the two 1x1 convolutions beside the latent.

    The decoded images stay the same; the latents get zero mean and unit variance in each channel, which one
    scalar scaling factor cannot do. A second call with the same images changes nothing.

    Args:
        images: what the statistics are taken of, [N, 3, H, W] in [0, 1].
    """
    latent = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(64)])
    mean, std = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
    channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:channels] /= std[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / std
    encode.bias[channels:] -= 2 * std.log()  # log-variance
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= std[None, :, None, None]


# --------------------------------------------------------------------------------------------- U-Net and text


def load_or_build(args, tokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """U-Net and text encoder in float32: random under the seed, or those of --init-from.

    Raises:
        ValueError: the words of --init-from have other tokens.
    """
    torch.manual_seed(args.seed)
    if args.init_from is None:
        return build_unet(), build_text_encoder(tokenizer)
    if CLIPTokenizer.from_pretrained(args.init_from / "tokenizer").get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{args.init_from} was trained with other token ids than the mini world's words have now, so its "
            "text encoder would read other words. Train U-Net and text encoder without --init-from."
        )
    unet = UNet2DConditionModel.from_pretrained(args.init_from, subfolder="unet")
    # transformers keeps the stored fp16 unless told otherwise; diffusers casts.
    options = {"subfolder": "text_encoder", "dtype": torch.float32}
    return unet, CLIPTextModel.from_pretrained(args.init_from, **options)


def train_unet(
    args, vae: AutoencoderKL, tokenizer, work: Path, log: Log
) -> tuple[nn.Module, nn.Module, dict]:
    """Train U-Net and text encoder on cached latents; returns the EMA weights and what was done."""
    unet, text = load_or_build(args, tokenizer)
    unet = unet.to(args.device, memory_format=torch.channels_last).train()
    text = text.to(args.device).train()
    modules, clock = {"unet": unet, "text": text}, Clock(stage_minutes(args, "unet") * 60)
    training = Training("unet", modules, args.lr, clock, work / "unet.pt", identity(args, "unet"))
    if not training.over():
        latents = cached_latents(vae, tokenizer, work / "latents.pt", args.scenes, args.device)
        alpha_bars = DDIMScheduler.from_config(scheduler_config()).alphas_cumprod.to(args.device)

        def forward(step: int) -> tuple[int, dict[str, Tensor]]:
            batch = latents.batch(np.random.default_rng((args.seed, step)), args.batch, args.device)
            loss = denoising_loss(unet, text, batch, alpha_bars, step_generator(args.seed, step))
            return len(batch["latent"]), {"loss": loss}

        training.run(forward, log)
    return *training.averages.values(), training.record()


def scheduler_config() -> dict:
    """The noise schedule of Stable Diffusion 1.x."""
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the model, which the stage unet writes (`model` in --work)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("work/mini-diffusion"), help="folder of state and caches"
    )
    parser.add_argument(
        "--minutes", type=float, default=90, help="time for all stages, rendering not counted"
    )
    parser.add_argument("--stages", nargs="+", choices=("vae", "unet"), default=["vae", "unet"])
    parser.add_argument("--vae-share", type=float, default=0.2, help="share of it for vae before unet")
    parser.add_argument("--init-from", type=Path, help="a folder this script wrote: start from its weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of U-Net and text encoder")
    parser.add_argument(
        "--scenes",
        type=int,
        default=40000,
        help="object scenes in the cache; street crops and sensor crops a quarter as many each, whole "
        "streets a sixteenth",
    )
    parser.add_argument("--vae-batch", type=int, default=8)
    parser.add_argument(
        "--batch", type=int, default=32, help="batch at 16x16 latents; a quarter of it at 32x32"
    )
    args = parser.parse_args(argv)
    args.output = args.output or args.work / "model"
    for stage in args.stages:
        if stage_minutes(args, stage) <= 0:
            parser.error(
                f"--minutes {args.minutes} --vae-share {args.vae_share} leaves the stage {stage} no time: "
                "give more minutes, and a share above 0 and below 1."
            )
    held = list(args.output.glob("*"))
    if held and args.output / "model_index.json" not in held:
        parser.error(f"--output {args.output} holds no model but {held[0].name}: give another folder.")
    if args.init_from is not None and not (args.init_from / "model_index.json").is_file():
        parser.error(f"--init-from {args.init_from} has no model_index.json: give a folder of this script.")
    if args.init_from is None and "vae" not in args.stages and not (args.work / "vae.pt").exists():
        parser.error("--stages unet needs an autoencoder: give --init-from FOLDER, or add the stage vae.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for stage in args.stages:
        check_state(args, stage)
    if args.threads:
        torch.set_num_threads(args.threads)
    log = Log(args.work / "log.jsonl")
    tokenizer = build_tokenizer(args.work / "tokenizer")
    if "vae" in args.stages or args.init_from is None:
        vae = train_vae(args, args.work, log)
        if "unet" not in args.stages:
            return print(f"The autoencoder is in {args.work / 'vae.pt'}; --stages unet makes a model of it.")
        images = vae_images(args.work / "vae_images.npz")
        crops = images.crops(np.random.default_rng(args.seed), batch=512, size=64)
        normalise_latents(vae, crops.to(args.device))
    else:
        vae = AutoencoderKL.from_pretrained(args.init_from, subfolder="vae").to(args.device)
    vae = vae.requires_grad_(False).eval()
    unet, text, record = train_unet(args, vae, tokenizer, args.work, log)
    record |= {
        "init_from": args.init_from and weights_fingerprint(args.init_from),
        "seed": args.seed,
        "lr": args.lr,
        "batch": args.batch,
        "scenes": args.scenes,
        "device": args.device,
        "torch": torch.__version__,
    }
    save_pipeline(
        args.output, vae, unet, text, args.work / "tokenizer", DDIMScheduler.from_config(scheduler_config())
    )
    (args.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    log(stage="saved", **record)


if __name__ == "__main__":
    main()
