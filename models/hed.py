"""HED, holistically nested edge detection (arXiv 1504.06375), as ControlNet's annotator has it."""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion.weights import misfits, read_weights

LAYERS = (2, 2, 3, 3, 3)
WIDTHS = (64, 128, 256, 512, 512)
HUB = ("lllyasviel/Annotators", "ControlNetHED.pth")  # repository and file of the published weights


class Block(nn.Module):
    """3x3 convolutions, each with a ReLU, whose last output is also projected to one channel of edges."""

    def __init__(self, inputs: int, outputs: int, layers: int):
        super().__init__()
        widths = [inputs, *[outputs] * layers]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.projection = nn.Conv2d(outputs, 1, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            features = F.relu(conv(features))
        return features, self.projection(features)


class HED(nn.Module):
    """Edges of an image; names of the parameters are those of the published ControlNetHED.pth.

    Args:
        widths: of the five blocks; others than the published ones make small networks for tests.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS):
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))  # subtracted from RGB in 0..255
        inputs = (3, *widths)
        for number, layers in enumerate(LAYERS):
            self.add_module(f"block{number + 1}", Block(inputs[number], widths[number], layers))

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Edges uint8 [B, H, W], 255 where one is sure, of images [B, 3, H, W] in [0, 1]."""
        features, maps = 255 * image - self.norm, []
        for number in range(1, len(LAYERS) + 1):
            features = features if number == 1 else F.max_pool2d(features, 2)
            features, edges = self.get_submodule(f"block{number}")(features)
            maps.append(F.interpolate(edges, image.shape[-2:], mode="bilinear", align_corners=False))
        return (255 * torch.cat(maps, 1).mean(1).sigmoid()).to(torch.uint8)  # cut off, not rounded


def load_hed(path: Path) -> HED:
    """The frozen network of a file of weights; no code in it is run.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it does not hold the network's weights.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"There are no weights of the edge detector HED: looked for {path}. Give ControlNetHED.pth of "
            f"the hub's {HUB[0]} by --hed."
        )
    found = read_weights(path, torch.float32, lambda key: True)
    model = HED(
        tuple(
            len(found.get(f"block{number}.projection.weight", torch.empty(1, 1))[0]) for number in range(1, 6)
        )
    )
    if wrong := misfits(found, model.state_dict()):
        raise ValueError(
            f"{path} does not hold the weights of HED: found {wrong}. Give ControlNetHED.pth of the hub's "
            f"{HUB[0]}."
        )
    model.load_state_dict(found)
    return model.requires_grad_(False).eval()
