"""Files of generated support images: an image is written whole, with the record of its making inside.

So the manifest is a function of the images in a folder, whichever processes wrote them and were stopped when.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image, PngImagePlugin

from functional.support_images import SUFFIXES, parse_support_name


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name, of this writer alone, that becomes `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_image(path: Path, pixels: np.ndarray, record: dict) -> None:
    """Write pixels, uint8 [H, W, 3], as JPEG (quality 95) or PNG with a record as its comment.

    Nothing has this name before the file is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record)
    with whole(path) as temporary:
        if path.suffix == ".png":
            info = PngImagePlugin.PngInfo()
            info.add_text("comment", text)
            Image.fromarray(pixels).save(temporary, "PNG", pnginfo=info)
        else:
            Image.fromarray(pixels).save(temporary, "JPEG", quality=95, comment=text.encode())


def read_record(path: Path) -> dict:
    """What write_image put into an image beside its pixels.

    Raises:
        ValueError: there is no record, or the record of another image.
    """
    with Image.open(path) as image:
        comment = image.info.get("comment", "")
    text = comment.decode(errors="replace") if isinstance(comment, bytes) else comment
    record = json.loads(text) if text.startswith("{") else {}
    if (record.get("class"), record.get("k")) != parse_support_name(path.name)[1:]:
        raise ValueError(
            f"{path} was not written by generate_support_images under this name: found the record {record}. "
            "Move it out of the profile's folder."
        )
    return record


def write_manifest(folder: Path) -> int:
    """Write manifest.jsonl, a line for each image in a folder, sorted by path; return how many there are.

    A process does so once, after its last image. Looking and writing hold a lock (manifest.lock, which stays
    as an empty file), so of several processes the last to get it sees all images that any of them wrote.
    """
    with open(folder / "manifest.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, also by the end of the process
        found = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and not p.name.startswith("."))
        lines = [{"path": path.relative_to(folder).as_posix(), **read_record(path)} for path in found]
        write_text(folder / "manifest.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    return len(lines)


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all, also where other processes write the same file."""
    with whole(path) as temporary:
        temporary.write_text(text, "utf-8")
