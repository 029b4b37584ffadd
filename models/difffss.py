"""DifFSS, stage A: pictures of a class in the shape of a support's mask (arXiv 2307.00773).

A frozen Stable Diffusion draws them, held to a control picture by a ControlNet (arXiv 2302.05543); each is
later paired with the mask that its control was made from. Settings are those of the authors' generator, but
for its 2 steps, which look as if left from a trial: see docs/methods/difffss.md.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    StableDiffusionControlNetPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from models.diffusion.stable_diffusion import DTYPES, StableDiffusion, check_choices
from models.diffusion.weights import (
    ROOT,
    hub_path,
    misfits,
    read_config,
    read_weights,
)

# Options that the config of a model may leave at others, by which the published samplers are defined.
SAMPLERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "unipc": (UniPCMultistepScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
}
CONTROLNET_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
CONTROLNET_WEIGHTS += tuple(name.replace(".safetensors", ".bin") for name in CONTROLNET_WEIGHTS)


class SupportGenerator(nn.Module):
    """Draws the N pictures of one (image, class) as one batch.

    On one machine's CPU they depend on prompts, control and the list of seeds only, bit by bit. The noise of
    each depends on its own seed alone, on any device and in any batch; but a network's arithmetic may differ
    in the last bits with the size of the batch, so whoever needs equal bytes draws as many at once.

    Args:
        diffusion: with unet, vae_decoder and text_encoder.
        controlnet: trained on this U-Net, see load_controlnet.
        sampler: of SAMPLERS; the published one is DDIM with eta 0.
        steps: of the sampler.
        guidance: scale of classifier-free guidance; 1 leaves the unconditional branch out.
        control_scale: of the ControlNet's residuals at all its injection points.
        control_end: share of the steps after which the ControlNet is left out.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    def __init__(
        self,
        diffusion: StableDiffusion,
        controlnet: ControlNetModel,
        sampler: Literal["ddim", "unipc", "dpmpp_2m"] = "ddim",
        steps: int = 20,
        guidance: float = 9.0,
        control_scale: float = 1.0,
        control_end: float = 1.0,
    ):
        super().__init__()
        for part in ("unet", "vae_decoder"):
            diffusion.require(part)
        if steps < 1 or guidance < 1 or control_scale < 0 or not 0 < control_end <= 1:
            raise ValueError(
                f"steps and guidance are at least 1, control_scale at least 0, control_end in (0, 1]: found "
                f"steps {steps}, guidance {guidance:g}, control_scale {control_scale:g}, control_end "
                f"{control_end:g}. Correct what is out of range."
            )
        self.diffusion, self.controlnet = diffusion, controlnet.requires_grad_(False).eval()
        self.steps, self.guidance = steps, guidance
        self.control_scale, self.control_end = control_scale, control_end
        self.pipeline = StableDiffusionControlNetPipeline(
            vae=diffusion.vae,
            text_encoder=None,  # prompts come encoded, each once
            tokenizer=diffusion.tokenizer,
            unet=diffusion.unet,
            controlnet=controlnet,
            scheduler=make_scheduler(diffusion.folder, sampler),
            safety_checker=None,  # it would put black pictures in the place of some
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def forward(self, prompt: str, negative_prompt: str, control: Tensor, seeds: Sequence[int]) -> Tensor:
        """Pictures of one prompt and control.

        Args:
            control: [3, H, W] in [0, 1], H and W multiples of the diffusion model's stride.
            seeds: of the N noises, see initial_noise.

        Returns:
            [N, 3, H, W] float32 in [0, 1], on the CPU.

        Raises:
            ValueError: the control's size does not fit the model, or the prompt is too long for it.
        """
        stride, number = self.diffusion.stride, len(seeds)
        if control.ndim != 3 or len(control) != 3 or any(side % stride for side in control.shape[1:]):
            raise ValueError(
                f"A control picture is [3, H, W] with sides in multiples of {stride}, the stride of the "
                f"diffusion model: found {list(control.shape)}. Resize it by "
                "functional.control_images.generation_size."
            )
        texts = self.diffusion.encode_text([prompt, negative_prompt])
        positive, negative = (text.expand(number, -1, -1) for text in texts)
        noise = initial_noise(seeds, (self.diffusion.latent_channels, *self.latent_size(control)))
        images = self.pipeline(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            image=control[None],
            latents=noise.to(positive.device, positive.dtype),
            height=control.shape[1],
            width=control.shape[2],
            num_inference_steps=self.steps,
            guidance_scale=float(self.guidance),
            controlnet_conditioning_scale=float(self.control_scale),
            control_guidance_end=float(self.control_end),
            output_type="pt",
        ).images
        return images.float().cpu()

    def latent_size(self, control: Tensor) -> tuple[int, int]:
        return tuple(side // self.diffusion.vae_factor for side in control.shape[-2:])


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [N, *shape], float32, on the CPU: the n-th of the n-th seed and nothing else."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def make_scheduler(folder: Path, sampler: str) -> SchedulerMixin:
    """The sampler for the noise schedule of a model folder in the layout of diffusers.

    20 DDIM steps of Stable Diffusion 1.5 are the timesteps 951, 901, ..., 1, as in the authors' code.

    Raises:
        ValueError: no sampler has this name.
    """
    check_choices("sampler", [sampler], SAMPLERS)
    kind, options = SAMPLERS[sampler]
    config = read_config(folder, "scheduler/scheduler_config.json")
    return kind.from_config({"timestep_spacing": "leading", "steps_offset": 1} | config | options)


def load_controlnet(
    path: str, dtype: Literal["float32", "float16", "bfloat16"] = "float32"
) -> ControlNetModel:
    """A frozen ControlNet from a folder of diffusers (config.json, diffusion_pytorch_model.safetensors).

    Args:
        path: local folder, relative to the current one or else to the project's root, or a hub name; a local
            copy is used before any network.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing and cannot be had.
        ValueError: the weights do not fit the config; the message names them.
    """
    check_choices("dtype", [dtype], DTYPES)
    folder = find_controlnet(path)
    with torch.device("meta"):  # no time for random values that are replaced at once
        model = ControlNetModel.from_config(read_config(folder, "config.json"))
    file = next(folder / name for name in CONTROLNET_WEIGHTS if (folder / name).is_file())
    found = read_weights(file, DTYPES[dtype], lambda key: True)
    if wrong := misfits(found, model.state_dict()):
        raise ValueError(
            f"{file} does not hold the weights that its config.json describes: found {wrong}. Fetch the "
            "folder anew."
        )
    model.load_state_dict(found, assign=True)
    return model.requires_grad_(False).eval()


def find_controlnet(path: str) -> Path:
    """Folder of a ControlNet; see load_controlnet."""
    local = next((folder for folder in (Path(path).expanduser(), ROOT / path) if folder.is_dir()), None)
    if local is None:
        hub_file(path, CONTROLNET_WEIGHTS[0])
        local = hub_file(path, "config.json").parent
    missing = [] if (local / "config.json").is_file() else ["config.json"]
    missing += [] if any((local / file).is_file() for file in CONTROLNET_WEIGHTS) else CONTROLNET_WEIGHTS[:1]
    if missing:
        raise FileNotFoundError(
            f"The ControlNet folder {str(local)!r} lacks {' and '.join(missing)}. It must have the layout of "
            "diffusers: save the model by save_pretrained there, or give another folder."
        )
    return local


def hub_file(name: str, file: str) -> Path:
    """A file of a hub repository (owner/name): from the local cache, else downloaded.

    Raises:
        FileNotFoundError: it is not there and cannot be had.
    """
    found, told = hub_path(name, file)
    if found is not None:
        return found
    reason = f"the hub did not give it ({told})" if told else "it is no hub name (owner/name)"
    raise FileNotFoundError(
        f"There is no {file} of {name!r}: found no such folder or file, and {reason}. Give a local path, or "
        f"run `hf download {name}` where there is a network."
    )
