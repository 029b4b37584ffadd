"""Score a checkpoint on test sets: python test.py RUN_DIR [--checkpoint best|NAME|PATH] [--data FILE ...]."""

import argparse
import sys
from functools import partial
from pathlib import Path

from config_files import UsageError, read_yaml, set_environment, short_errors

# The options of functional.sliding_window.segment_image that change nothing: a method that has no use for
# others can tell whether any were given.
WHOLE = {"window": None, "window_stride": None, "scales": [1.0], "flip": False}


def arguments(args: list[str] | None) -> argparse.Namespace:
    """Parse the command line and read the YAML files that it names, before torch is imported."""
    parser = argparse.ArgumentParser(prog="test.py", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run")
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        action="extend",
        help="instead of a run, for methods without training",
    )
    parser.add_argument(
        "--checkpoint", help="name in its checkpoints/, or a path (default: best if there is one, else last)"
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], help="YAML files with a section data: to score on"
    )
    parser.add_argument("--output", type=Path, help="default: RUN_DIR/test, or runs/<config name>/test")
    parser.add_argument("--devices", type=int, default=1, help="processes, one per GPU or on a CPU")
    parser.add_argument("--pictures", type=int, default=8, help="first and worst images of each set to draw")
    pair = {"type": int, "nargs": 2, "metavar": ("H", "W")}
    parser.add_argument("--window", **pair, help="see images in windows of this size (default: whole)")
    parser.add_argument("--window-stride", **pair, help="step between windows (default: half the window)")
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], metavar="S", help="mean over sizes (default: 1)"
    )
    parser.add_argument("--flip", action="store_true", help="mean over each image and its mirror image")
    found = parser.parse_args(args)
    if (found.run is None) == (found.config is None):
        raise UsageError("give the folder of a run, or --config FILE for a method without training.")
    if found.config and found.checkpoint:
        raise UsageError("--checkpoint belongs to a run folder: --config builds an untrained model.")
    if found.window_stride and not found.window:
        raise UsageError("--window-stride is the step between windows: give their size by --window H W.")
    if found.devices < 1:
        raise UsageError(f"--devices is the number of processes: give 1 or more, not {found.devices}.")
    stems = [path.stem for path in found.data]
    if doubled := {stem for stem in stems if stems.count(stem) > 1}:
        raise UsageError(
            f"--data names several files {min(doubled)}: their results would overwrite each other."
        )
    for path in [*(found.config or []), *found.data]:
        section = read_yaml(path)
        if path in found.data and "data" not in section:
            raise UsageError(
                f"{path} has no section data:, found {', '.join(section)}.\nName a DataModule under data:."
            )
    return found


def chosen_protocol(options: argparse.Namespace) -> tuple[dict, str]:
    """Return the options of functional.sliding_window.segment_image, and how the result folder's name ends.

    Raises:
        ValueError: a window, stride or scale is out of its range.
    """
    from functional.sliding_window import check_scales, check_window, half

    window, stride, ending = options.window, options.window_stride, ""
    check_scales(options.scales)
    if window:
        stride = stride or half(window)
        check_window(window, stride)
        ending += "-window{}x{}".format(*window)
        ending += "-stride{}x{}".format(*stride) if stride != half(window) else ""
    if options.scales != [1]:
        ending += "-scales" + "-".join(map(str, options.scales))
    ending += "-flip" if options.flip else ""
    return {"window": window, "window_stride": stride, "scales": options.scales, "flip": options.flip}, ending


def score(
    model, datamodule, folder: Path, step: int, pictures: int, protocol: dict, devices: int
) -> dict | None:
    """Run the test sets of a DataModule and leave metrics.json, metrics.md and pictures in a folder.

    Returns:
        {"step", "protocol", "mean", "sets"} with scores in percent, the same for any number of devices; None
        in all processes but the first.
    """
    from lightning.pytorch import Trainer, seed_everything

    from callbacks.pictures import TestPictures
    from callbacks.run_record import nest_metrics, write_atomically, write_metrics
    from cli import check_classes
    from functional.sliding_window import segment_image
    from mistakes import edge_errors

    check_classes(model, datamodule)
    seed_everything(0, workers=True, verbose=False)
    folder.mkdir(parents=True, exist_ok=True)
    table = model.classes
    if protocol != WHOLE:
        model.protocol = partial(segment_image, **protocol)
    drawing = TestPictures(folder / "pictures", pictures, table.names, table.colors)
    with edge_errors():
        trainer = Trainer(
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            use_distributed_sampler=False,  # each process has its share of the images already
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[drawing],
        )
        trainer.test(model, datamodule=datamodule, verbose=False)
    if not trainer.is_global_zero:
        return None
    found = {
        "step": step,
        **model.terms,
        "protocol": protocol,
        **nest_metrics(trainer.callback_metrics, "test"),
    }
    write_metrics(folder, {"test": found})
    for name, text in model.details().items():
        write_atomically(folder / name, text)
    return found


def main(args: list[str] | None = None) -> None:
    """Score, write and print; a mistake in the command line ends with exit code 2."""
    set_environment()
    with short_errors():
        options = arguments(sys.argv[1:] if args is None else args)
        from callbacks.run_record import metrics_table
        from cli import build, load_model, resolve, resolve_data
        from mistakes import edge_errors

        with edge_errors():
            protocol, ending = chosen_protocol(options)
        if options.run:
            model, config, step, name = load_model(options.run, options.checkpoint)
        else:
            config, step, name = resolve(options.config), 0, "config"
            model, _ = build({"model": config["model"]})
        output = options.output or (options.run or Path("runs") / options.config[0].stem) / "test"
        for path in options.data or [None]:
            data = config["data"] if path is None else resolve_data(path)
            _, datamodule = build({"data": data})
            folder = output / f"{path.stem if path else 'own'}-{name}{ending}"
            found = score(model, datamodule, folder, step, options.pictures, protocol, options.devices)
            if found is None:
                continue
            terms = "".join(f", {key}: {value}" for key, value in model.terms.items())
            print(f"\n{folder}: checkpoint {name}, step {step}{terms}\n\n{metrics_table(found)}")
            print(f"Pictures: {folder / 'pictures'}")


if __name__ == "__main__":
    main()
