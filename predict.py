"""Masks for images and videos: python predict.py RUN_DIR|--config FILE --input PATH [--output DIR].

In Python: `from predict import load; load("runs/x").predict("street.png")`; and, for classes of one's own,
`load("conf/diffsegmenter_open.yaml", classes=["dog", "bench", "grass"]).heat("photo.jpg")`.
"""

from __future__ import annotations  # so that the heavy imports can wait until the command line is understood

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from config_files import UsageError, read_yaml, set_environment, short_errors
from functional.classes import open_table
from video import VIDEO_SUFFIXES, check_kept_answers, label_video, open_video, save_png

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
        UsageError: this machine has no such device; or the model cannot be asked for a class, because it has
            never read its name or its prompt is too long.
    """

    def __init__(self, model, device: str | None = None):
        import torch

        self.device = torch.device(find_device(device))
        self.model = model.eval().to(self.device)
        self.names, self.colors = list(model.classes.names), [tuple(color) for color in model.classes.colors]
        self.has_heat = hasattr(model, "score_maps")
        if self.has_heat:
            read_prompts(model)

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
        import torch

        with torch.inference_mode():
            return to_ids(self.model.predict_step(self.batch(image, name), 0))

    def heat(
        self, image: str | Path | Image.Image | np.ndarray | Tensor, name: str = "image"
    ) -> dict[str, np.ndarray]:
        """How much each place of an image belongs to a class: {class name: float32 [H, W] in [0, 1]}.

        Of the classes that the image is believed to show, see models.candidates. Arguments as for predict.

        Raises:
            ValueError: the method has no such maps; or as predict.
        """
        return self.predict_with_heat(image, name)[1]

    def predict_with_heat(
        self, image: str | Path | Image.Image | np.ndarray | Tensor, name: str = "image"
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return what predict and heat do, for the work of one of them."""
        import torch

        if not self.has_heat:
            raise ValueError(
                "Heat maps need a method that scores each class by itself: found "
                f"{type(self.model).__name__}, which has none. Take one of conf/diffsegmenter_*.yaml."
            )
        with torch.inference_mode():
            found = self.model.score_maps(self.batch(image, name))
            [(ids, maps)] = found
            heat = zip(ids, maps.float().cpu().numpy(), strict=True)
            return to_ids(self.model.labels(found)), {self.names[i]: one for i, one in heat}

    def batch(self, image: str | Path | Image.Image | np.ndarray | Tensor, name: str) -> dict:
        """The batch of one image, on the device."""
        name = Path(image).stem if isinstance(image, str | Path) else name
        return {"image": to_tensor(image)[None].to(self.device), "name": [name]}


def to_ids(labels: Tensor) -> np.ndarray:
    """Class ids uint8 [H, W] of a batch [1, H, W]."""
    import numpy as np

    return labels[0].cpu().numpy().astype(np.uint8)


def read_prompts(model) -> None:
    """Encode the prompts of all classes, so that a word that cannot be asked for is found before any image.

    Raises:
        UsageError: names the word or prompt.
    """
    from mistakes import edge_errors

    network, table = model.network, model.classes
    with edge_errors():
        network.prompt.encode(network.diffusion, network.prompts(table.words[int(table.has_background) :]))


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


def load(
    place: str | Path | Sequence[str | Path],
    device: str | None = None,
    classes: str | Sequence[str] | None = None,
) -> Predictor:
    """Load a checkpoint file, the best checkpoint of a run folder, or a method that needs no training.

    Args:
        place: file or folder; or the YAML file of such a method, or a list of them where later ones overrule.
        device: see Predictor.
        classes: words to look for ("dog, bench" or ["dog", "bench"]), for methods that find what is named.

    Raises:
        UsageError: says what is wrong with the place, its content or the classes.
    """
    set_environment()
    words = None if classes is None else split_words(classes)
    one = isinstance(place, str | Path)
    if not one or Path(place).suffix in (".yaml", ".yml"):
        configs = [Path(place)] if one else [Path(path) for path in place]
        return Predictor(untrained_model(configs, words), device)
    from cli import load_model

    if words is not None:
        raise UsageError(
            f"{place} was trained on classes of its own, but --classes asks for {', '.join(words)}.\n"
            "Leave --classes out, or take --config conf/diffsegmenter_open.yaml, which finds what is named."
        )
    return Predictor(load_model(Path(place))[0], device)


def split_words(classes: str | Sequence[str]) -> list[str]:
    """Split "dog, bench" at its commas; a list stays as it is.

    Raises:
        UsageError: there is no word, an empty one or one twice.
    """
    words = [word.strip() for word in classes.split(",")] if isinstance(classes, str) else list(classes)
    try:
        open_table(words)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return words


def untrained_model(configs: Sequence[Path], words: list[str] | None):
    """Build the model of config files; words are the classes to look for.

    Where the config takes candidates from labels, which new images lack, words make all of them candidates.

    Raises:
        UsageError: words for a model that finds only the classes of a table, or none for one that needs them.
    """
    from lightning.pytorch.utilities.seed import isolate_rng

    from cli import build, resolve

    for path in configs:
        read_yaml(path)  # its mistakes are told with file and line
    with isolate_rng():  # which LightningCLI seeds
        model = resolve(configs)["model"]
    options, files = model["init_args"], " ".join(map(str, configs))
    by_label = options.get("candidates") in ("labels", {"class_path": "models.candidates.LabelCandidates"})
    if words is not None:
        room, _, name = model["class_path"].rpartition(".")
        if not hasattr(getattr(import_module(room), name), "score_maps"):
            raise UsageError(
                f"{name} ({files}) knows the classes of its table only, but --classes asks for "
                f"{', '.join(words)}.\nLeave --classes out, or take --config conf/diffsegmenter_open.yaml."
            )
        options["classes"] = words
        if by_label:
            options["candidates"] = "all"
    elif by_label or options.get("classes") == []:
        reason = "takes them from labels" if by_label else "names none"
        raise UsageError(
            f"new images do not tell which classes to look for, and the config ({files}) {reason}.\n"
            'Name them, such as --classes "dog, bench, grass" (in Python classes=["dog", "bench", "grass"]).'
        )
    return build({"model": model})[0]


def input_images(path: Path) -> list[Path]:
    """Return the image files that --input, no video, stands for.

    Raises:
        UsageError: the path does not exist, the folder has no images, or two differ only in their suffix.
    """
    from datamodules.reading import IMAGE_SUFFIXES

    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"--input {path} does not exist.\nGive an image, a folder of images or a video.")
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
        "--config",
        type=Path,
        nargs="+",
        action="extend",
        help="instead of a run, for methods without training",
    )
    parser.add_argument(
        "--classes",
        help='what to look for, such as "dog, bench, grass", with a --config of DiffSegmenter; a config that '
        "takes candidates from labels predicts with --classes only, and looks for all of them",
    )
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        help=f"an image, a folder of images, or a video ({' '.join(VIDEO_SUFFIXES)})",
    )
    parser.add_argument(
        "--output", type=Path, help="default: RUN_DIR/predictions, or runs/<config name>/predictions"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: CUDA where there is one)")
    found = parser.parse_args(args)
    if (found.run is None) == (found.config is None):
        raise UsageError("give the folder of a run, or --config FILE for a method without training.")
    for path in found.config or []:
        read_yaml(path)
    if found.classes is not None:
        split_words(found.classes)
    return found


def main(args: list[str] | None = None) -> None:
    """Write for each image <name>_ids.png, <name>_overlay.png and, if the method has maps, <name>_heat.png.

    For a video <name>_ids/000000.png .. and <name>_overlay.mp4; and always legend.png.
    """
    set_environment()
    with short_errors():
        options = arguments(sys.argv[1:] if args is None else args)
        is_video = options.input.suffix.lower() in VIDEO_SUFFIXES
        inputs = [open_video(options.input)] if is_video else input_images(options.input)
        device = find_device(options.device)
        from lightning.pytorch import seed_everything
        from rich.progress import track

        from callbacks.pictures import heat_maps, legend
        from datamodules.reading import read_image
        from functional.palette import overlay
        from mistakes import edge_errors

        seed_everything(0, verbose=False)
        predictor = load(options.run or options.config, device, options.classes)
        if options.run:
            home = options.run if options.run.is_dir() else options.run.parent.parent
        else:
            home = Path("runs") / options.config[0].stem
        output = options.output or home / "predictions"
        output.mkdir(parents=True, exist_ok=True)
        save_png(legend(predictor.names, predictor.colors, 480), output / "legend.png")
        if is_video:
            [video] = inputs
            check_kept_answers(predictor.model)
            label = partial(predictor.predict, name=video.path.stem)  # one noise, or masks would flicker
            with edge_errors():
                count = label_video(video, label, predictor.colors, output)
            print(f"Masks and an overlay of {count} frame(s) and legend.png are in {output}")
            return
        for path in track(inputs, "Predicting", disable=len(inputs) == 1):
            with edge_errors():
                image = read_image(path)
                if predictor.has_heat:
                    ids, maps = predictor.predict_with_heat(image, path.stem)
                    save_png(heat_maps(image, maps), output / f"{path.stem}_heat.png")
                else:
                    ids = predictor.predict(image, path.stem)
            save_png(ids, output / f"{path.stem}_ids.png")
            save_png(overlay(image, ids, predictor.colors), output / f"{path.stem}_overlay.png")
        print(f"Masks and overlays of {len(inputs)} image(s) and legend.png are in {output}")


if __name__ == "__main__":
    main()
