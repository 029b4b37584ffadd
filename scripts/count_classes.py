"""Count the pixels of each class in the training labels of a data set: rare class sampling draws by them.

    python -m scripts.count_classes --config conf/madm_rgb2depth.yaml --workers 8

The data set is the DataModule in the config's section data, or of an adaptation its source. Without --output
the file goes to where that config reads it, rare_class_sampling.statistics.
"""

import argparse
import json
from pathlib import Path

from callbacks.run_record import write_atomically
from cli import build, resolve_data
from config_files import UsageError, read_yaml, short_errors
from datamodules.rare_classes import count_pixels, counts_document
from mistakes import edge_errors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file with a section data:")
    parser.add_argument("--output", type=Path, help="JSON file; by default the one that the config reads")
    parser.add_argument("--workers", type=int, default=0, help="processes that read labels")
    args = parser.parse_args(argv)
    if "data" not in read_yaml(args.config):
        raise UsageError(f"{args.config} has no section data:.\nName there the DataModule to count.")
    data = resolve_data(args.config)
    options = data.get("init_args", {})
    output = args.output or (options.get("rare_class_sampling") or {}).get("statistics")
    if output is None:
        raise UsageError(
            f"{args.config} sets no data.init_args.rare_class_sampling.statistics.\n"
            "Say by --output FILE where the counts go."
        )
    _, datamodule = build({"data": options.get("source", data)})  # the target's files may be elsewhere
    with edge_errors():
        dataset = datamodule.train_dataset()
        pixels = count_pixels(dataset, args.workers)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(counts_document(dataset, pixels)) + "\n")
    print(f"{len(pixels)} labels with {pixels.any(0).sum()} classes counted: {output}")


if __name__ == "__main__":
    with short_errors():
        main()
