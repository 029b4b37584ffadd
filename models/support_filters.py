"""Scores by which badly drawn support images can be rejected; the DifFSS code keeps all of them.

Each is called with an image [3, H, W] in [0, 1], the mask [H, W] it was drawn for and the class's name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from models.diffsegmenter import DiffSegmenter
from models.diffusion.stable_diffusion import StableDiffusion
from models.diffusion.weights import name_some
from models.prompts import PromptStyle

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class SegmenterAgreement(nn.Module):
    """IoU of the mask with where DiffSegmenter finds the class, in [0, 1].

    Args:
        diffusion: with unet, vae_encoder and text_encoder.
        level: score above which a pixel is of the class.
        prefix: of the prompt, before the class's name.
    """

    def __init__(self, diffusion: StableDiffusion, level: float = 0.5, prefix: str = "a photo of a"):
        super().__init__()
        self.diffusion, self.level, self.prompt = diffusion, level, PromptStyle(prefix)

    def forward(self, image: Tensor, mask: Tensor, name: str) -> float:
        # Not by the image's name but always the same noise: the score is a function of the image.
        segmenter = DiffSegmenter(self.diffusion, self.prompt, tuple(image.shape[-2:]))
        found = segmenter.score_maps(image.to(self.diffusion.device), "", [name])[0].cpu() > self.level
        return ((found & mask).sum() / (found | mask).sum().clamp(min=1)).item()


class ClipScore(nn.Module):
    """Cosine of CLIP's embeddings of the name and of what the mask leaves of the image, cut to its box.

    Args:
        path: folder or hub name of a CLIP in transformers' layout.

    Raises:
        ValueError: weights that its config.json describes are missing or of another shape.
    """

    def __init__(self, path: str):
        super().__init__()
        # By itself the library only warns, and fills what is missing with random values.
        model, report = CLIPModel.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True
        )
        wrong = set(report["missing_keys"]) | {name for name, *_ in report["mismatched_keys"]}
        if wrong or report["error_msgs"]:
            raise ValueError(
                f"{path} does not hold the weights of CLIP that its config.json describes: missing or of "
                f"another shape are {name_some(wrong | set(report['error_msgs']))}. Fetch it anew, or give "
                "another model by --clip."
            )
        self.clip = model.requires_grad_(False).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(path)

    @torch.no_grad()
    def forward(self, image: Tensor, mask: Tensor, name: str) -> float:
        if not mask.any():
            return 0.0
        (top, left), (bottom, right) = mask.nonzero().amin(0).tolist(), mask.nonzero().amax(0).tolist()
        crop = (image * mask)[None, :, top : bottom + 1, left : right + 1].to(self.clip.device)
        side = self.clip.config.vision_config.image_size
        crop = F.interpolate(crop, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (crop.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        tokens = self.tokenizer([f"a photo of a {name}"], return_tensors="pt").to(self.clip.device)
        output = self.clip(pixel_values=(crop - mean) / std, **tokens)
        return F.cosine_similarity(output.image_embeds, output.text_embeds).item()
