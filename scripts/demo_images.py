"""Write a folder of street scenes of the mini world as PNG files: something for predict.py to read.

python -m scripts.demo_images --output runs/demo/images --count 10
"""

import argparse
from pathlib import Path

from PIL import Image

from datamodules.mini_world.street import CONDITIONS, render_street


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the images")
    parser.add_argument("--count", type=int, default=10, help="number of images; conditions take turns")
    parser.add_argument("--size", type=int, default=128, help="side in pixels, 64 to 512")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for index in range(args.count):
        condition = CONDITIONS[index % len(CONDITIONS)]
        scene = render_street("test", index, size=args.size, condition=condition)
        Image.fromarray(scene["rgb"]).save(args.output / f"{index:03d}-{condition}.png")
    print(f"{args.count} images in {args.output}")


if __name__ == "__main__":
    main()
