"""Videos, one frame at a time: reading, labelling and writing them through PyAV (extra `demo`).

PyAV is imported where a video is opened, so that pictures need no part of it.
"""

from __future__ import annotations  # as predict.py, which imports this before anything heavy

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from config_files import UsageError

if TYPE_CHECKING:
    import numpy as np

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm")
# Encoders, two of H.264 first, with their options; the first that this build of PyAV has writes the overlays.
ENCODERS = {"libx264": {"crf": "20"}, "libopenh264": {}, "mpeg4": {}}
BITS_PER_PIXEL = 0.25  # where an encoder knows no constant quality


@dataclass(frozen=True)
class Video:
    """A video file with its frames per second, and their number as far as the file tells."""

    path: Path
    rate: Fraction
    length: int | None


def import_av():
    """Return PyAV.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import av
    except ImportError:
        raise UsageError(
            "videos need PyAV, and this environment has none.\n"
            'Install it: pip install -c constraints.txt -e ".[demo]"'
        ) from None
    return av


def open_video(path: Path) -> Video:
    """Look into a video without reading its frames.

    Raises:
        UsageError: PyAV is missing, the file does not exist, or it is no video.
    """
    av = import_av()
    if not path.is_file():
        raise UsageError(f"--input {path} does not exist.\nGive an image, a folder of images or a video.")
    with _readable(path), av.open(str(path)) as container:
        stream = next(iter(container.streams.video), None)
        rate = stream and (stream.average_rate or stream.guessed_rate)
        if not rate:
            raise UsageError(_unreadable(path, "found no pictures with a frame rate"))
        seconds = Fraction(container.duration or 0, av.time_base)
        return Video(path, rate, stream.frames or round(seconds * rate) or None)


def read_frames(video: Video) -> Iterator[np.ndarray]:
    """Yield the frames as they are to be shown, uint8 [H, W, 3] RGB; one is in memory at a time.

    Raises:
        UsageError: the file is damaged, or has no frame.
    """
    import numpy as np

    av, count = import_av(), 0
    with _readable(video.path, lambda: f", after frame {count}"), av.open(str(video.path)) as container:
        for frame in container.decode(video=0):
            count += 1
            # Phones store the picture as the sensor lies, with the turn to the left that makes it upright.
            yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
    if not count:
        raise UsageError(_unreadable(video.path, "found no frame in it"))


@contextmanager
def _readable(path: Path, where: Callable[[], str] = str):
    """Inside the block PyAV's errors become one that names the file."""
    av = import_av()
    try:
        yield
    except av.error.FFmpegError as error:
        raise UsageError(_unreadable(path, f"{error.strerror}{where()}")) from None


def _unreadable(path: Path, found: str) -> str:
    return (
        f"{path} cannot be read as a video: {found} ({path.stat().st_size} bytes).\n"
        "Replace the file, or convert it to MP4."
    )


@contextmanager
def write_video(path: Path, rate: Fraction) -> Iterator[Callable[[np.ndarray], None]]:
    """Inside the block the yielded function adds frames uint8 [H, W, 3] to an MP4, which appears at its end.

    Odd sizes grow by a copy of their last row or column, which H.264 asks for.
    """
    import numpy as np

    av = import_av()
    encoder = next(name for name in ENCODERS if name in av.codecs_available)
    rate = rate.limit_denominator(max(1, int(65535 / rate)))  # MPEG-4 counts time in 16 bits
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream(encoder, rate, options=ENCODERS[encoder])
            stream.pix_fmt, count = "yuv420p", 0

            def add(picture: np.ndarray) -> None:
                nonlocal count
                height, width = picture.shape[:2]
                picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                if not count:
                    stream.height, stream.width = picture.shape[:2]
                    stream.bit_rate = int(BITS_PER_PIXEL * stream.height * stream.width * rate)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = count, 1 / rate
                container.mux(stream.encode(frame))
                count += 1

            yield add
            container.mux(stream.encode())  # what the encoder still holds
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write class ids uint8 [H, W] or a picture uint8 [H, W, 3]; nobody ever finds a part of the file."""
    from PIL import Image

    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(picture).save(temporary, "png")
    temporary.replace(path)


def label_video(
    video: Video,
    label: Callable[[np.ndarray], np.ndarray],
    colors: Sequence[tuple[int, int, int]],
    output: Path,
) -> int:
    """Write <name>_ids/000000.png .. and <name>_overlay.mp4 (without sound) of a video into a folder.

    Args:
        video: what to label.
        label: frame uint8 [H, W, 3] to class ids uint8 [H, W].
        colors: RGB (0..255) of each id.
        output: the folder; ids of an earlier run are removed from it, as they may be more.

    Returns:
        The number of frames.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TimeRemainingColumn

    from functional.palette import overlay

    class Throughput(ProgressColumn):
        def render(self, task) -> str:
            return f"{task.speed or 0:.2f} frames/s"

    ids, count = output / f"{video.path.stem}_ids", 0
    ids.mkdir(exist_ok=True)
    for earlier in ids.glob("[0-9]" * 6 + ".png"):
        earlier.unlink()
    columns = "Predicting", BarColumn(), MofNCompleteColumn(), Throughput(), TimeRemainingColumn()
    with Progress(*columns) as bar, write_video(output / f"{video.path.stem}_overlay.mp4", video.rate) as add:
        for frame in bar.track(read_frames(video), video.length):
            found = label(frame)
            save_png(found, ids / f"{count:06d}.png")
            add(overlay(frame, found, colors))
            count += 1
    return count


def check_kept_answers(model) -> None:
    """Refuse a model that keeps answers by an image's name, which is the same for all frames of a video.

    Raises:
        UsageError: it keeps captions or candidates in a file.
    """
    parts = [getattr(model, part, None) for part in ("candidates", "captioner")]
    parts.append(getattr(parts[0], "captioner", None))
    if kept := [str(part.cache.path) for part in parts if getattr(part, "cache", None) is not None]:
        raise UsageError(
            f"the frames of a video have one name, by which {' and '.join(kept)} would keep one answer.\n"
            "Set cache: null in the config."
        )
