"""Support images in the order of the released code (DifFSS, arXiv 2307.00773): what must be equalled.

One image after the other: its prompts are encoded anew, and in each DDIM step (eta 0) ControlNet and U-Net
run once for the prompt and once more for the negative prompt, each time for a single row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.difffss import SupportGenerator, initial_noise
from models.diffusion.inversion import ddim_step


@torch.no_grad()
def plain_images(
    generator: SupportGenerator, prompt: str, negative_prompt: str, control: Tensor, seeds: Sequence[int]
) -> Tensor:
    """As SupportGenerator with the sampler ddim: images [N, 3, H, W] in [0, 1], on the CPU."""
    diffusion, images = generator.diffusion, []
    control = control[None].to(diffusion.device, diffusion.dtype)
    steps = 1000 // generator.steps
    timesteps = [step * steps + 1 for step in reversed(range(generator.steps))]
    for seed in seeds:
        diffusion.text_cache.clear()
        texts = [diffusion.encode_text([text]) for text in (prompt, negative_prompt)]
        latent = initial_noise([seed], (diffusion.latent_channels, *generator.latent_size(control)))
        latent = latent.to(diffusion.device, diffusion.dtype)
        for t in timesteps:
            noise, negative = (controlled_noise(generator, latent, t, text, control) for text in texts)
            noise = negative + generator.guidance * (noise - negative)
            alphas = (diffusion.alpha_bars[step].to(latent) for step in (t, max(t - steps, 0)))
            latent = ddim_step(latent, noise, *alphas)
        images.append(diffusion.decode(latent).clamp(0, 1).cpu())
    return torch.cat(images)


def controlled_noise(
    generator: SupportGenerator, latent: Tensor, timestep: int, text: Tensor, control: Tensor
) -> Tensor:
    """The noise in a latent [1, C, h, w] by one prompt's embeddings, with the ControlNet's residuals."""
    arguments = generator.diffusion.unet_arguments(latent, timestep, text)
    skips, middle = generator.controlnet(*arguments, control, generator.control_scale, return_dict=False)
    return generator.diffusion.unet(
        *arguments, down_block_additional_residuals=skips, mid_block_additional_residual=middle
    ).sample
