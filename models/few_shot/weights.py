"""Weights of backbones: ImageNet's by torchvision and timm, published PSPNets', our checkpoints'."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.diffusion.weights import ROOT, first_line, hub_path, misfits, name_some

HUB_FILE = "model.safetensors"
FILES = (".safetensors", ".pth", ".pt", ".ckpt")  # a hub name does not end so
CLASSIFIERS = ("fc.", "classifier.", "pre_logits.", "head.")  # of ImageNet
SEGMENTERS = ("ppm.", "cls.", "aux.")  # of PSPNet


def find_file(weights: str) -> Path:
    """The file of these weights: a file, a folder with model.safetensors, or a name on the hub.

    Paths are relative to the current folder or else to the project's root; of a hub name the local cache is
    asked first.

    Raises:
        FileNotFoundError: there is none and none can be had.
    """
    path = Path(weights).expanduser()
    if not path.exists():
        path = ROOT / path  # an absolute path stays as it is
    path = path / HUB_FILE if path.is_dir() else path
    if path.is_file():
        return path
    found, told = (None, "") if path.suffix in FILES else hub_path(weights, HUB_FILE)
    if found is not None:
        return found
    reason = "and it is no hub name (owner/name)"
    if told:
        reason = f"nor in the local hub cache, and the hub did not give it ({told})"
    raise FileNotFoundError(
        f"There are no weights {weights!r}: found no file {str(path)!r} {reason}. Give a file "
        f"({', '.join(FILES)}), a folder with {HUB_FILE}, or a hub name such as timm/resnet50.tv_in1k, "
        "which `hf download NAME` fetches where there is a network."
    )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a file by their names without what wraps them; runs no code of the file.

    Names lose module., network., encoder., backbone.; PSPNet's encoder.2. is layer2., a second copy of it.

    Raises:
        ValueError: the file is damaged, holds more than tensors and plain values, or names two different
            tensors alike.
    """
    try:
        if file.suffix == ".safetensors":
            stored = load_file(file)
        else:
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and pickle raise many kinds; all mean that it cannot be used
        raise ValueError(
            f"The weights {str(file)!r} cannot be read without running code that they bring, or are damaged: "
            f"{first_line(error)}. Fetch them anew, or save their tensors alone as .safetensors."
        ) from error
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    tensors, twice = {}, []
    for key, value in stored.items():
        name = re.sub(r"^((module|network|backbone)\.)+", "", key)
        name = re.sub(r"^encoder\.", "", re.sub(r"^encoder\.(?=\d\.)", "layer", name))
        if isinstance(value, Tensor):
            twice += [key] if name in tensors and not torch.equal(tensors[name], value) else []
            tensors[name] = value
    if twice or not tensors:
        found = f"a second, different tensor as {name_some(twice)}" if twice else "no tensors by name"
        raise ValueError(
            f"The weights {str(file)!r} are not those of one backbone: found {found}. Give a file of one "
            "network's tensors, or with these under 'state_dict'."
        )
    return tensors


def load_backbone(
    module: nn.Module, weights: str, unused: tuple[str, ...] = CLASSIFIERS + SEGMENTERS
) -> None:
    """Fill a backbone, which has rename(tensors) -> tensors by its own names, from published or own weights.

    Args:
        module: is filled in place.
        weights: .safetensors, .pth, .pt or .ckpt file, folder with model.safetensors, or hub name.
        unused: beginnings of names in the file that are left out.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: the file cannot be read; or keys are missing, unexpected or mismatched, which are named.
    """
    file = find_file(weights)
    found = {key: value for key, value in read_tensors(file).items() if not key.startswith(unused)}
    found, own = module.rename(found), module.state_dict()
    # How often a BatchNorm was updated decides nothing here, and older files do not tell.
    needed = {k: v for k, v in own.items() if k in found or not k.endswith("num_batches_tracked")}
    if wrong := misfits(found, needed):
        raise ValueError(
            f"The weights {str(file)!r} are not of this {type(module).__name__}. Found {wrong}. Correct the "
            "network's arguments (depth, widths, stem, number of classes), or give other weights."
        )
    module.load_state_dict({**own, **found})
