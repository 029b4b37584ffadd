"""Average the weights of a run's latest checkpoints into one file, to be scored like any other.

    python train.py --config FILE --checkpoints.keep_last 5
    python -m scripts.average_checkpoints runs/x                  # writes runs/x/checkpoints/average.ckpt
    python test.py runs/x --checkpoint runs/x/checkpoints/average.ckpt

Weights and running statistics are averaged in float64; counters are those of the latest file. The result
holds no optimiser, so no training goes on from it.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from callbacks.checkpoints import write_checkpoint
from config_files import UsageError, short_errors
from run_folder import load_checkpoint

KEPT = ("config", "classes", "frozen", "state_dict", "global_step", "epoch", "pytorch-lightning_version")


def average(paths: list[Path]) -> dict:
    """Return the checkpoint whose weights are the mean of these, in the order of their steps.

    Raises:
        UsageError: they are of different models, or rest on different frozen weights.
    """
    total: dict[str, Tensor] = {}
    last: dict = {}
    for path in tqdm(paths, desc="averaging", unit="file"):
        checkpoint = load_checkpoint(path)
        weights = checkpoint["state_dict"]
        if last and (last["frozen"] != checkpoint["frozen"] or shapes(last["state_dict"]) != shapes(weights)):
            raise UsageError(
                f"{path} is not of the same model as the files before it: names, shapes or frozen weights "
                "differ.\nAverage the checkpoints of one run."
            )
        for name, weight in weights.items():
            if weight.is_floating_point():
                total[name] = total.get(name, 0) + weight.double()
        last = checkpoint
    means = {name: (sum_ / len(paths)).to(last["state_dict"][name].dtype) for name, sum_ in total.items()}
    last["state_dict"] |= means
    return {key: last[key] for key in KEPT if key in last} | {"averaged": [path.name for path in paths]}


def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Shape of each weight by name."""
    return {name: weight.shape for name, weight in weights.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run with checkpoints/step-<N>.ckpt")
    parser.add_argument("--last", type=int, help="how many (default: all that there are)")
    parser.add_argument("--output", type=Path, help="default: RUN/checkpoints/average.ckpt")
    args = parser.parse_args(argv)
    with short_errors():
        folder = args.run / "checkpoints"
        found = sorted(folder.glob("step-*.ckpt"), key=lambda path: int(path.stem.split("-")[1]))
        wanted = len(found) if args.last is None else args.last
        if not 2 <= wanted <= len(found):
            raise UsageError(
                f"two or more checkpoints are averaged: {wanted} asked for, found {len(found)} files "
                f"step-<N>.ckpt in {folder}.\nTrain with --checkpoints.keep_last 5, or give another --last."
            )
        output = args.output or folder / "average.ckpt"
        write_checkpoint(average(found[-wanted:]), output)
        print(f"{output}: mean of {', '.join(path.name for path in found[-wanted:])}.")
        print(f"Score it by: python test.py {args.run} --checkpoint {output}")


if __name__ == "__main__":
    main()
