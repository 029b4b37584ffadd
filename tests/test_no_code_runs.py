"""No file that is read can run code: not a checkpoint, not weights, not what a cache keeps (F11)."""

import ast
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from callbacks.checkpoints import AtomicCheckpointIO
from models.captions import Captioner
from models.difffss import load_controlnet
from models.diffusion.stable_diffusion import StableDiffusion
from models.few_shot.resnet import ResNet
from models.hed import load_hed
from models.support_filters import ClipScore
from run_folder import load_checkpoint
from scripts.mini_diffusion.latents import cached
from scripts.mini_diffusion.scenes import vae_images
from tests.tiny_blip import write_tiny_blip
from tests.tiny_difffss import write_tiny_clip, write_tiny_models

ROOT = Path(__file__).parent.parent


class Harm:
    """Makes a folder of this name when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_tiny_models(folder)
    write_tiny_clip(folder / "clip")
    write_tiny_blip(folder / "blip")
    return folder


def part(name: str, file: str):
    """The file of a part of Stable Diffusion, and how it is loaded."""
    return f"model/{name}/{file}", lambda folder: StableDiffusion(str(folder / "model"), (LOADED[name],))


REFUSED = r"cannot be read|[Ww]eights[ _]only|lacks model\.safetensors"
LOADED = {"unet": "unet", "vae": "vae_encoder", "text_encoder": "text_encoder"}
DIFFUSERS = "diffusion_pytorch_model.bin"
READERS = {
    "U-Net": part("unet", DIFFUSERS),
    "autoencoder": part("vae", DIFFUSERS),
    "text encoder": part("text_encoder", "pytorch_model.bin"),
    "ControlNet": (f"controlnet/{DIFFUSERS}", lambda folder: load_controlnet(str(folder / "controlnet"))),
    "CLIP": ("clip/pytorch_model.bin", lambda folder: ClipScore(str(folder / "clip"))),
    "BLIP": ("blip/pytorch_model.bin", lambda folder: Captioner(str(folder / "blip"))),
    "HED": ("hed.pth", lambda folder: load_hed(folder / "hed.pth")),
    "backbone .pth": ("net.pth", lambda folder: ResNet((1, 1, 1, 1), weights=str(folder / "net.pth"))),
    "backbone .ckpt": ("net.ckpt", lambda folder: ResNet((1, 1, 1, 1), weights=str(folder / "net.ckpt"))),
    "checkpoint to resume": (
        "a.ckpt",
        lambda folder: AtomicCheckpointIO().load_checkpoint(folder / "a.ckpt"),
    ),
    "checkpoint to score": ("a.ckpt", lambda folder: load_checkpoint(folder / "a.ckpt")),
    "cached latents": ("latents.pt", lambda folder: cached(folder / "latents.pt", "key", dict)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_would_run_code_is_refused(models, tmp_path, reader):
    file, load = READERS[reader]
    folder, marker = shutil.copytree(models, tmp_path / "models"), tmp_path / "ran"
    for safe in (folder / file).parent.glob("*.safetensors"):
        safe.unlink()  # which would be preferred
    torch.save({"conv1.weight": Harm(marker), "key": "key"}, folder / file)
    with pytest.raises(Exception, match=REFUSED):
        load(folder)
    assert not marker.exists()
    torch.load(folder / file, weights_only=False)  # the file does harm where it is read without care
    assert marker.exists()


def test_kept_pictures_that_would_run_code_are_refused(tmp_path):
    objects = np.array([Harm(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "scenes.npz", street=objects, sensor=objects, objects=objects)
    with pytest.raises(ValueError, match="allow_pickle"):
        vae_images(tmp_path / "scenes.npz")
    assert not (tmp_path / "ran").exists()


ROOMS = ("callbacks", "datamodules", "functional", "lightning_modules", "models", "scripts", "benchmarks")


def calls(tree: ast.Module):
    """The calls in a module: their names with dots, their arguments by name as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_every_reader_of_the_product_is_a_safe_one():
    files = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    found = {}
    for path in files:
        for name, options in calls(ast.parse(path.read_text("utf-8"))):
            where = f"{path.relative_to(ROOT)}: {name}"
            if name == "torch.load":
                found[where] = options["weights_only"]
            elif name in ("np.load", "numpy.load"):
                found[where] = options["allow_pickle"]
            else:
                forbidden = ("pickle.load", "pickle.loads", "eval", "exec", "yaml.unsafe_load")
                assert name not in forbidden, where
    # The one command that is made for foreign pickles asks for an option that says so.
    assert found.pop("scripts/convert_madm.py: torch.load") == "not allow_pickle"
    assert len(found) >= 6 and set(found.values()) == {"True", "False"}
    assert {value for name, value in found.items() if name.endswith("torch.load")} == {"True"}
