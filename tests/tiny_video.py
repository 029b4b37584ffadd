"""A video of given frames, kept to the bit, written in a moment."""

from fractions import Fraction
from pathlib import Path

import numpy as np


def random_frames(count: int = 3, height: int = 12, width: int = 14) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8))


def save_video(path: Path, frames: list, rate: Fraction = Fraction(10), turn: int = 0) -> Path:
    """Write a .mov or .avi of frames uint8 [H, W, 3], to be shown `turn` degrees turned to the left."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate, width=frames[0].shape[1], height=frames[0].shape[0])
        stream.pix_fmt = "rgb24"
        if turn:
            stream.set_display_rotation(turn)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
