"""Train a ControlNet (arXiv 2302.05543) on the frozen mini Stable Diffusion, within a time budget.

    python -m scripts.train_mini_controlnet --kind mask --minutes 15 --output assets/mini-controlnet-mask
    python -m scripts.train_mini_controlnet --kind edge --minutes 15 --output assets/mini-controlnet-edge

The control is a picture of the exact label of an object scene: class colours (`mask`) or edges (`edge`).
State is saved every few minutes in --work; the same command goes on from it, and one that would train
something else is refused. The result is a folder of diffusers' ControlNetModel: fp16 EMA weights.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from functional.classes import MINI_OBJECTS
from functional.control_images import edge_image, mask_image
from scripts.mini_diffusion.latents import LabelledLatents, cached_labelled_latents
from scripts.mini_diffusion.loop import Clock, Log, Training, denoising_loss, step_generator
from scripts.mini_diffusion.state import check_state, identity, weights_fingerprint

CONTROLS = {"mask": partial(mask_image, colors=MINI_OBJECTS.colors), "edge": edge_image}
EMPTY_SHARE = 0.5  # of the captions (section 3.3): what they do not tell must be read from the control
CONDITION_CHANNELS = (16, 32, 96, 256)  # those of SD's ControlNets; each but the first halves the picture


def build_controlnet(unet: UNet2DConditionModel, vae: AutoencoderKL, start: Path | None) -> ControlNetModel:
    """A ControlNet with the U-Net's encoder and zero convolutions, or with the weights of the folder `start`.

    The control has the size of the image: as many halvings as the autoencoder's lead to the latent's.

    Raises:
        ValueError: the weights of `start` belong to a U-Net of another size.
    """
    channels = CONDITION_CHANNELS[: len(vae.config.block_out_channels)]
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    if start is None:
        return controlnet
    weights = ControlNetModel.from_pretrained(start).state_dict()
    shapes = {name: tensor.shape for name, tensor in controlnet.state_dict().items()}
    if {name: tensor.shape for name, tensor in weights.items()} != shapes:
        raise ValueError(
            f"--init-from {start} holds a ControlNet of another U-Net than that of --model: names or shapes "
            "of its weights differ. Give one that was trained on a model of the same sizes, or none."
        )
    controlnet.load_state_dict(weights)
    return controlnet


def controlled(unet, controlnet, control, noised, timestep, context):
    """The U-Net's output with the ControlNet's residuals added to its skip connections and its middle.

    Nothing before the first of these sums takes a gradient: autograd records the ControlNet and the frozen
    decoder only, and of the decoder no gradients of weights.

    Args:
        control: [B, 3, H, W] in [0, 1]; noised: [B, 4, h, w]; timestep: [B]; context: [B, tokens, width].
    """
    skips, middle = controlnet(noised, timestep, context, control, return_dict=False)
    return unet(
        noised,
        timestep,
        context,
        down_block_additional_residuals=skips,
        mid_block_additional_residual=middle,
    )


def load_frozen(args) -> tuple[UNet2DConditionModel, CLIPTextModel, LabelledLatents, ControlNetModel]:
    """The parts of --model in float32, the scenes in its latents, and the ControlNet to train on it."""
    torch.manual_seed(args.seed)  # of the convolutions that read the control
    vae = AutoencoderKL.from_pretrained(args.model, subfolder="vae").to(args.device)
    unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet")
    text = CLIPTextModel.from_pretrained(args.model, subfolder="text_encoder", dtype=torch.float32)
    controlnet = build_controlnet(unet, vae, args.init_from)
    tokenizer = CLIPTokenizer.from_pretrained(args.model / "tokenizer")
    path = args.work / "scenes.pt"
    scenes = cached_labelled_latents(vae, tokenizer, path, args.scenes, args.device)
    unet = unet.to(args.device, memory_format=torch.channels_last).requires_grad_(False).eval()
    text = text.to(args.device).requires_grad_(False).eval()
    return unet, text, scenes, controlnet.to(args.device, memory_format=torch.channels_last).train()


def train(args, log: Log) -> tuple[ControlNetModel, dict]:
    """Train on cached latents; returns the EMA weights and what was done."""
    unet, text, scenes, controlnet = load_frozen(args)
    name, clock, trained = f"controlnet {args.kind}", Clock(args.minutes * 60), identity(args, "controlnet")
    path = args.work / "controlnet.pt"
    training = Training(name, {"controlnet": controlnet}, args.lr, clock, path, trained)
    alpha_bars = DDIMScheduler.from_pretrained(args.model, subfolder="scheduler").alphas_cumprod
    alpha_bars = alpha_bars.to(args.device)

    def forward(step: int) -> tuple[int, dict[str, Tensor]]:
        generator = np.random.default_rng((args.seed, step))
        batch = scenes.batch(generator, args.batch, EMPTY_SHARE, args.device)
        control = CONTROLS[args.kind](batch["label"]).contiguous(memory_format=torch.channels_last)
        denoise = partial(controlled, unet, controlnet, control)
        loss = denoising_loss(denoise, text, batch, alpha_bars, step_generator(args.seed, step))
        return len(control), {"loss": loss}

    if not training.over():
        training.run(forward, log)
    return training.averages["controlnet"], training.record()


def save_controlnet(folder: Path, controlnet: ControlNetModel, record: dict) -> None:
    """Write config, fp16 weights and record; each file is moved to its place whole, others there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        controlnet.cpu().half().save_pretrained(temporary)
        (Path(temporary) / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        for path in sorted(Path(temporary).iterdir()):
            path.replace(folder / path.name)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=tuple(CONTROLS), required=True, help="what the control shows")
    parser.add_argument(
        "--model", type=Path, default=Path("assets/mini-diffusion"), help="the frozen model, in SD's layout"
    )
    parser.add_argument("--minutes", type=float, default=15, help="time to train, rendering not counted")
    parser.add_argument("--work", type=Path, help="folder of state and cache (work/controlnet-KIND)")
    parser.add_argument("--output", type=Path, help="folder of the result (`model` in --work)")
    parser.add_argument("--init-from", type=Path, help="a folder this script wrote: start from its weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--scenes", type=int, default=12000, help="object scenes whose latents are cached")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args(argv)
    args.work = args.work or Path(f"work/controlnet-{args.kind}")
    args.output = args.output or args.work / "model"
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes} leaves no time to train: give more than 0.")
    if not (args.model / "model_index.json").is_file():
        parser.error(f"--model {args.model} has no model_index.json: give a folder of train_mini_diffusion.")
    if args.init_from is not None and not (args.init_from / "config.json").is_file():
        parser.error(f"--init-from {args.init_from} has no config.json: give a folder of this script.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_state(args, "controlnet")
    if args.threads:
        torch.set_num_threads(args.threads)
    log = Log(args.work / "log.jsonl")
    controlnet, done = train(args, log)
    record = done | {
        "kind": args.kind,
        "model": weights_fingerprint(args.model),
        "init_from": args.init_from and weights_fingerprint(args.init_from),
        "empty_captions": EMPTY_SHARE,
        "seed": args.seed,
        "lr": args.lr,
        "batch": args.batch,
        "scenes": args.scenes,
        "device": args.device,
        "torch": torch.__version__,
    }
    save_controlnet(args.output, controlnet, record)
    log(stage="saved", **record)


if __name__ == "__main__":
    main()
