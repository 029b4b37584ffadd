"""Names, seeds and profile ids of generated support images (DifFSS, arXiv 2307.00773; names of its code)."""

import hashlib
import json
from collections.abc import Mapping

SUFFIXES = (".jpg", ".png")  # in the order in which a reader tries them


def support_name(stem: str, class_number: int, k: int) -> str:
    """`2008_000008_15_0`: the k-th picture (0, 1, ...) for class 15 of image 2008_000008, without a suffix.

    The name is the reference code's and may hold folders (`train2014/COCO_..._1_0`). `class_number` is the
    data set's own id, counted from 1; FSS-1000 has 1 in all names.
    """
    return f"{stem}_{class_number}_{k}"


def parse_support_name(name: str) -> tuple[str, int, int]:
    """(stem, class number, k) of a name with or without a suffix of `SUFFIXES`: support_name's inverse.

    Raises:
        ValueError: the name does not end in _<class>_<k>.
    """
    bare = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
    parts = bare.rsplit("_", 2)
    if len(parts) != 3 or not parts[0] or not all(part.isascii() and part.isdigit() for part in parts[1:]):
        raise ValueError(
            f"A generated support image is named <stem>_<class>_<k>: found {name!r}. "
            "Keep other files out of the folder, or rename this one."
        )
    return parts[0], int(parts[1]), int(parts[2])


def support_seed(dataset: str, stem: str, class_number: int, k: int, profile_seed: int) -> int:
    """Seed of one picture's noise, in [0, 2^31): it depends on what the picture is of, and on nothing else.

    The first 8 bytes, big-endian, of SHA-256 of "dataset|stem|class|k|profile_seed", modulo 2^31.
    """
    text = f"{dataset}|{stem}|{class_number}|{k}|{profile_seed}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 2**31


def profile_hash(settings: Mapping[str, object]) -> str:
    """Id of the settings pictures were made with: 12 hexadecimal digits, the same for any order of keys."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
