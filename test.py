"""Score a checkpoint on test sets: python test.py RUN_DIR [--checkpoint best|last|PATH] [--data FILE ...]."""

import argparse
import sys
from pathlib import Path

from config_files import UsageError, read_yaml, set_environment, short_errors


def arguments(args: list[str] | None) -> argparse.Namespace:
    """Parse the command line and read the YAML files that it names, before torch is imported."""
    parser = argparse.ArgumentParser(prog="test.py", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run")
    parser.add_argument(
        "--config", type=Path, nargs="+", help="instead of a run, for methods without training"
    )
    parser.add_argument(
        "--checkpoint", help="best, last or a path (default: best if there is one, else last)"
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], help="YAML files with a section data: to score on"
    )
    parser.add_argument("--output", type=Path, help="default: RUN_DIR/test, or runs/<config name>/test")
    parser.add_argument("--pictures", type=int, default=8, help="images of each set to draw")
    found = parser.parse_args(args)
    if (found.run is None) == (found.config is None):
        raise UsageError("give the folder of a run, or --config FILE for a method without training.")
    if found.config and found.checkpoint:
        raise UsageError("--checkpoint belongs to a run folder: --config builds an untrained model.")
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


def score(model, datamodule, folder: Path, step: int, pictures: int) -> dict:
    """Run the test sets of a DataModule and leave metrics.json, metrics.md and pictures in a folder.

    Returns:
        {"step", "mean", "sets"} with scores in percent.
    """
    from lightning.pytorch import Trainer, seed_everything

    from callbacks.pictures import TestPictures
    from callbacks.run_record import nest_metrics, write_metrics
    from cli import check_classes
    from mistakes import edge_errors

    check_classes(model, datamodule)
    seed_everything(0, workers=True, verbose=False)
    folder.mkdir(parents=True, exist_ok=True)
    table = model.classes
    drawing = TestPictures(folder / "pictures", pictures, table.names, table.colors)
    trainer = Trainer(
        devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[drawing]
    )  # fmt: skip
    with edge_errors():
        trainer.test(model, datamodule=datamodule, verbose=False)
    found = {"step": step, **nest_metrics(trainer.callback_metrics, "test")}
    write_metrics(folder, {"test": found})
    return found


def main(args: list[str] | None = None) -> None:
    """Score, write and print; a mistake in the command line ends with exit code 2."""
    set_environment()
    with short_errors():
        options = arguments(sys.argv[1:] if args is None else args)
        from callbacks.run_record import metrics_table
        from cli import build, load_model, resolve, resolve_data

        if options.run:
            model, config, step, name = load_model(options.run, options.checkpoint)
        else:
            config, step, name = resolve(options.config), 0, "config"
            model, _ = build({"model": config["model"]})
        output = options.output or (options.run or Path("runs") / options.config[0].stem) / "test"
        for path in options.data or [None]:
            data = config["data"] if path is None else resolve_data(path)
            _, datamodule = build({"data": data})
            folder = output / f"{path.stem if path else 'own'}-{name}"
            found = score(model, datamodule, folder, step, options.pictures)
            print(f"\n{folder}: checkpoint {name}, step {step}\n\n{metrics_table(found)}")
            print(f"Pictures: {folder / 'pictures'}")


if __name__ == "__main__":
    main()
