"""The saved state of a stage, and which training it belongs to."""

import hashlib
from pathlib import Path

import torch


def save_state(path: Path, state: dict) -> None:
    """Write atomically: a kill in the middle leaves the previous state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def identity(args, stage: str) -> dict[str, str | int | float | None]:
    """The options that make a stage's training another one; of the weights it starts from, a fingerprint."""
    options = {"vae": ("seed", "vae_batch"), "unet": ("seed", "lr", "batch")}[stage]
    start = None
    if args.init_from is not None:
        digest = hashlib.sha256()
        for path in sorted(args.init_from.rglob("*.safetensors")):
            digest.update(path.read_bytes())
        start = f"weights with sha256 {digest.hexdigest()[:12]}"
    names = {"--" + name.replace("_", "-"): getattr(args, name) for name in options}
    return {"--init-from": start} | names


def check_states(args) -> None:
    """Refuse states in --work that another command left.

    Raises:
        ValueError: an option that makes the training another one differs.
    """
    for stage in args.stages:
        path = args.work / f"{stage}.pt"
        if not path.exists():
            continue
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        was, now = state.get("identity", {}), identity(args, stage)
        if differing := [f"{k} was {was.get(k)} and is {v}" for k, v in now.items() if was.get(k) != v]:
            raise ValueError(
                f"{path} holds the state of another training: {', '.join(differing)}. "
                "Choose another --work, delete that file, or give the options it was made with."
            )
