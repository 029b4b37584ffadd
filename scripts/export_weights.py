"""Write the network of a run as one safetensors file, from which other networks take their backbone.

    python -m scripts.export_weights runs/base_learner base.safetensors [--checkpoint best|last|PATH] [--half]

The file holds all weights by the network's own names, those too that the run did not train.
"""

import argparse
from pathlib import Path

from safetensors.torch import save

from callbacks.run_record import write_atomically
from cli import load_model
from config_files import short_errors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("output", type=Path, help="file to write")
    parser.add_argument("--checkpoint", default="last", help="best, last or a path")
    parser.add_argument("--half", action="store_true", help="store float32 as float16")
    args = parser.parse_args(argv)
    with short_errors():
        model, _, step, _ = load_model(args.run, args.checkpoint)
        weights = model.network.state_dict()
        if args.half:
            weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        contents = save({k: v.contiguous() for k, v in weights.items()}, metadata={"steps": str(step)})
        write_atomically(args.output, contents)
        print(f"{args.output}: {len(weights)} tensors.")


if __name__ == "__main__":
    main()
