"""Scenes that one core draws in a second, as wall-clock and CPU time.

python -m benchmarks.mini_world --output benchmarks/results/mini_world.json
"""

import argparse
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from benchmarks.record import provenance, report
from datamodules.mini_world.objects import render_objects
from datamodules.mini_world.street import MODALITIES, render_street


def rate(draw, count: int, first: int) -> dict[str, float]:
    """Scenes a second by the clock, and by the CPU time of this process (which contention does not change).

    Args:
        draw: called with the indices first, ..., first + count - 1.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    for index in range(first, first + count):
        draw(index)
    return {
        "wall_per_s": round(count / (time.perf_counter() - wall), 1),
        "cpu_per_s": round(count / (time.process_time() - cpu), 1),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=400, help="scenes of each kind")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f"--count {args.count} measures nothing: give at least 1.")
    cv2.setNumThreads(0)
    kinds = {
        "objects, 64 px": partial(render_objects, "train"),
        "objects, 256 px": partial(render_objects, "train", size=256),
        "street, RGB + label, 128 px": partial(render_street, "train"),
        "street, RGB + label, 128 px, game": partial(render_street, "train", style="game"),
        "street, all sensors, 128 px": partial(render_street, "train", sensors=MODALITIES),
        "street, RGB + label, 256 px": partial(render_street, "train", size=256),
    }
    result = {
        **provenance(),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "scenes": args.count,
    }
    for name, draw in kinds.items():
        rate(draw, 20, first=0)  # fills the noise bank
        result[name] = rate(draw, args.count, first=1000)
    report(result, args.output)


if __name__ == "__main__":
    main()
