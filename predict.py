"""Masks for an image or a folder: python predict.py RUN_DIR|--config FILE --input PATH [--output DIR].

In Python: `from predict import load; load("runs/x").predict("street.png")`.
"""

from __future__ import annotations  # so that the heavy imports can wait until the command line is understood

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from config_files import UsageError, read_yaml, set_environment, short_errors

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor


class Predictor:
    """A model with its class table that labels one image at a time.

    Args:
        model: LightningModule with `predict_step` and `classes`.
        device: "cpu", "cuda", ...; None takes CUDA where there is one.

    Raises:
        UsageError: this machine has no such device.
    """

    def __init__(self, model, device: str | None = None):
        import torch

        self.device = torch.device(find_device(device))
        self.model = model.eval().to(self.device)
        self.names, self.colors = list(model.classes.names), [tuple(color) for color in model.classes.colors]

    def predict(
        self, image: str | Path | Image.Image | np.ndarray | Tensor, name: str = "image"
    ) -> np.ndarray:
        """Label an image.

        Args:
            image: path, Pillow image, uint8 [H, W, 3] RGB, or float tensor [3, H, W] in [0, 1].
            name: what methods that draw noise per image seed it with; a path brings its own.

        Returns:
            Class ids, uint8 [H, W].

        Raises:
            ValueError: an array or tensor of another shape, type or range; or a file that is no image.
        """
        import numpy as np
        import torch

        if isinstance(image, str | Path):
            name = Path(image).stem
        batch = {"image": to_tensor(image)[None].to(self.device), "name": [name]}
        with torch.inference_mode():
            return self.model.predict_step(batch, 0)[0].cpu().numpy().astype(np.uint8)


def find_device(name: str | None) -> str:
    """Return the name of a device of this machine; None takes CUDA where there is one.

    Raises:
        UsageError: names the device asked for and those there are.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    there = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        there += [kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in there:
        raise UsageError(
            f"this machine has no device {name!r} that torch {torch.__version__} can use.\n"
            f"There is: {', '.join(there)}."
        )
    return name


def to_tensor(image: str | Path | Image.Image | np.ndarray | Tensor) -> Tensor:
    """Turn any form of an image that Predictor.predict takes into a float32 tensor [3, H, W] in [0, 1]."""
    import numpy as np
    import torch
    from PIL import Image

    from datamodules.reading import read_image, rgb_array

    if isinstance(image, str | Path):
        image = read_image(image)
    elif isinstance(image, Image.Image):
        image = rgb_array(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous().float() / 255
    if (
        isinstance(image, torch.Tensor)
        and image.is_floating_point()
        and image.ndim == 3
        and image.shape[0] == 3
    ):
        low, high = float(image.min()), float(image.max())
        if low >= 0 and high <= 1:
            return image.float()
        raise ValueError(
            f"An image tensor holds numbers in [0, 1]: found {low:g} to {high:g}. "
            "Divide 8-bit values by 255; do not normalise."
        )
    found = f"{getattr(image, 'dtype', '')} {list(getattr(image, 'shape', []))}".strip()
    raise ValueError(
        f"An image is a path, a Pillow image, uint8 [H, W, 3] or a float tensor [3, H, W] in [0, 1]: found "
        f"{type(image).__name__} {found}. Convert it to one of these."
    )


def load(place: str | Path, device: str | None = None) -> Predictor:
    """Load a checkpoint file, or the best checkpoint of a run folder."""
    from cli import load_model

    return Predictor(load_model(Path(place))[0], device)


def input_images(path: Path) -> list[Path]:
    """Return the image files that --input stands for.

    Raises:
        UsageError: the path does not exist, the folder has no images, or two differ only in their suffix.
    """
    from datamodules.reading import IMAGE_SUFFIXES

    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"--input {path} does not exist.\nGive an image or a folder of images.")
    images = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UsageError(f"the folder {path} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    stems = [p.stem for p in images]
    if doubled := {stem for stem in stems if stems.count(stem) > 1}:
        raise UsageError(
            f"{path} holds several images named {min(doubled)}: their masks would overwrite each other."
        )
    return images


def arguments(args: list[str]) -> argparse.Namespace:
    """Parse the command line and read the YAML files that it names, before torch is imported."""
    parser = argparse.ArgumentParser(prog="predict.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run, or a checkpoint")
    parser.add_argument(
        "--config", type=Path, nargs="+", help="instead of a run, for methods without training"
    )
    parser.add_argument("--input", type=Path, required=True, help="an image or a folder of images")
    parser.add_argument(
        "--output", type=Path, help="default: RUN_DIR/predictions, or runs/<config name>/predictions"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: CUDA where there is one)")
    found = parser.parse_args(args)
    if (found.run is None) == (found.config is None):
        raise UsageError("give the folder of a run, or --config FILE for a method without training.")
    for path in found.config or []:
        read_yaml(path)
    return found


def main(args: list[str] | None = None) -> None:
    """Write for each image <name>_ids.png and <name>_overlay.png, and one legend.png."""
    set_environment()
    with short_errors():
        options = arguments(sys.argv[1:] if args is None else args)
        images, device = input_images(options.input), find_device(options.device)
        from lightning.pytorch import seed_everything
        from PIL import Image
        from rich.progress import track

        from callbacks.pictures import legend
        from cli import build, resolve
        from datamodules.reading import read_image
        from functional.palette import overlay
        from mistakes import edge_errors

        seed_everything(0, verbose=False)
        if options.run:
            predictor = load(options.run, device)
            home = options.run if options.run.is_dir() else options.run.parent.parent
        else:
            predictor = Predictor(build({"model": resolve(options.config)["model"]})[0], device)
            home = Path("runs") / options.config[0].stem
        output = options.output or home / "predictions"
        output.mkdir(parents=True, exist_ok=True)
        Image.fromarray(legend(predictor.names, predictor.colors, 480)).save(output / "legend.png")
        for path in track(images, "Predicting", disable=len(images) == 1):
            with edge_errors():
                image = read_image(path)
                label = predictor.predict(image, name=path.stem)
            Image.fromarray(label).save(output / f"{path.stem}_ids.png")
            picture = overlay(image, label, predictor.colors)
            Image.fromarray(picture).save(output / f"{path.stem}_overlay.png")
        print(f"Masks and overlays of {len(images)} image(s) and legend.png are in {output}")


if __name__ == "__main__":
    main()
