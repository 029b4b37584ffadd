"""The saved state of a training, and which training it belongs to."""

import hashlib
from pathlib import Path

import torch

from scripts.mini_diffusion.scenes import scenes_digest

# What makes the training of each stage another one.
OPTIONS = {
    "vae": ("init_from", "seed", "vae_batch"),
    "unet": ("init_from", "seed", "lr", "batch", "scenes"),
    "controlnet": ("kind", "model", "init_from", "seed", "lr", "batch", "scenes"),
}


def save_state(path: Path, state: dict) -> None:
    """Write atomically: a kill in the middle leaves the previous state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def weights_fingerprint(folder: Path) -> str:
    """A name for all weights in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return f"weights with sha256 {digest.hexdigest()[:12]}"


def identity(args, stage: str) -> dict[str, str | int | float | None]:
    """What makes a stage's training another one: options (of folders of weights a fingerprint) and scenes."""
    values = {"--" + name.replace("_", "-"): getattr(args, name) for name in OPTIONS[stage]}
    found = {k: weights_fingerprint(v) if isinstance(v, Path) else v for k, v in values.items()}
    return found if stage == "vae" else found | {"scenes drawn": scenes_digest()}


def check_state(args, stage: str) -> None:
    """Refuse the state of a stage that another command left in --work.

    Raises:
        ValueError: an option that makes the training another one differs.
    """
    path = args.work / f"{stage}.pt"
    if not path.exists():
        return
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    refuse_other(path, state.get("identity", {}), identity(args, stage))


def refuse_other(path: Path, was: dict, now: dict) -> None:
    """Raise a ValueError if the state in `path` was made by another training than this one."""
    if differing := [f"{k} was {was.get(k)} and is {v}" for k, v in now.items() if was.get(k) != v]:
        raise ValueError(
            f"{path} holds the state of another training: {', '.join(differing)}. "
            "Choose another --work, delete that file, or give the options it was made with."
        )
