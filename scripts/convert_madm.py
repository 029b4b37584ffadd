"""Turn a checkpoint of the authors' code for MADM (github.com/XiaRho/MADM) into a run that test.py can score.

    python -m scripts.convert_madm model_RGB2Depth.pth --config conf/madm_rgb2depth.yaml --output runs/depth
    python test.py runs/depth

Further words override the config as for train.py, such as --model.network.diffusion.attention sdpa. Only
weights are converted, so the run cannot be resumed. A .safetensors file holds the entries of "model" alone.
"""

import argparse
import pickle
import re
from collections import defaultdict
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from callbacks.checkpoints import AtomicCheckpointIO
from callbacks.run_record import redact, secret_values
from cli import SegmentationCLI, build
from config_files import UsageError, check_configs, short_errors
from lightning_modules.base import SegmentationModule
from mistakes import edge_errors
from models.diffusion.weights import name_some

CONDITIONING = (
    ("alpha_uncond_prompt$", "text_gate"),
    ("alpha_cond_prompt$", "prompt_gate"),
    ("alpha_cond_time$", "time_gate"),
    ("prompt_embed$", "prompt"),
    ("time_embed$", "time"),
)
PROJECTIONS = (
    (r"^(\d+)\.0\.(\w+)\.norm\.", r"\1.\2.1."),
    (r"^(\d+)\.0\.(\w+)\.weight$", r"\1.\2.0.weight"),
)
HEAD = (
    (r"^embed_layers\.(\d+)\.proj\.", r"embed.\1."),
    (r"^fuse_layer\.aspp_modules\.", "aspp."),
    (r"^fuse_layer\.bottleneck\.", "fuse."),
    (r"\.(depthwise_conv|conv)(?=\.)", ".0"),
    (r"\.(pointwise_conv|bn)(?=\.)", ".1"),
    (r"^conv_seg\.", "classifier."),
)
EXTRACTOR = "backbone.feature_extractor."
LDM = f"{EXTRACTOR}ldm_extractor."
# Their prefix, ours in the network, and what changes behind it. Where two of theirs become one of ours, the
# published configs share a module between RGB and the second modality, and files hold its weights twice.
PARTS = (
    (f"{LDM}unet.", ("diffusion.unet.",), ()),
    (f"{LDM}ema_unet.", ("ema_unet.",), ()),  # only of runs with ema_w_unet
    (f"{LDM}shared_noise", ("noise",), ()),
    (f"{LDM}uncond_inputs", ("adapter.conditioning.text", "ema_adapter.conditioning.text"), ()),
    (f"{EXTRACTOR}clip_project_rgb.", ("adapter.conditioning.",), CONDITIONING),
    (f"{EXTRACTOR}clip_project_others.", ("adapter.conditioning.",), CONDITIONING),
    (f"{EXTRACTOR}ema_clip_project_others.", ("ema_adapter.conditioning.",), CONDITIONING),
    ("backbone.feature_projections.", ("adapter.projections.",), PROJECTIONS),
    ("backbone.ema_feature_projections.", ("ema_adapter.projections.",), PROJECTIONS),
    ("sem_seg_head.", ("adapter.head.",), HEAD),
    ("sem_seg_head_sec_modal.", ("adapter.head.",), HEAD),
    ("ema_sem_seg_head.", ("ema_adapter.head.",), HEAD),
)
# Frozen parts, which the base model brings, and running statistics, which the teacher never reads.
UNUSED = re.compile(
    rf"{re.escape(LDM)}(vae|text_encoder)\."
    r"|ema_sem_seg_head\..*\.(running_mean|running_var|num_batches_tracked)$"
)


def our_names(key: str) -> list[str]:
    """Names in models.madm.MADM of an entry of theirs; empty for one that is not known."""
    for theirs, ours, changes in PARTS:
        if key.startswith(theirs):
            name = key.removeprefix(theirs)
            for pattern, replacement in changes:
                name = re.sub(pattern, replacement, name)
            return [prefix + name for prefix in ours]
    return []


def read_checkpoint(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], int]:
    """Weights of a file by name, and after how many steps they were saved (0 if the file does not tell).

    Raises:
        UsageError: the file holds more than tensors and plain values and pickles are not allowed; or it is
            missing, damaged or of another layout.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path), 0
        loaded = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except Exception as error:  # zip, pickle, import and end-of-file errors have no common class
        if isinstance(error, pickle.UnpicklingError) and not allow_pickle:
            blocked = re.search(r"GLOBAL (\S+)", str(error))
            raise UsageError(
                f"{path} holds more than tensors and plain values: {blocked[1] if blocked else 'a pickle'}.\n"
                "Reading it can run any code that its author put in. If you trust where it comes from, add\n"
                "--allow-pickle; else have its weights converted to .safetensors where that can do no harm."
            ) from None
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise UsageError(f"{path} cannot be read: {reason}.\nFetch it anew.") from None
    weights = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        found = name_some(map(str, loaded)) if isinstance(loaded, dict) else type(loaded).__name__
        raise UsageError(f'{path} has no tensors by name under "model": found {found}.')
    return weights, int(loaded.get("iteration", -1)) + 1


def fill(module: SegmentationModule, weights: dict[str, Tensor]) -> None:
    """Put their weights into a module with a MADM network.

    Raises:
        ValueError: names what is missing, unexpected or of another shape, duplicates that are not equal, and
            frozen weights that are not those of the module's base model.
    """
    found, origin, problems = {}, {}, defaultdict(list)
    for key, value in weights.items():
        if UNUSED.match(key):
            continue
        for name in our_names(key) or [key]:
            if name in found and not torch.equal(found[name], value):
                problems["unequal duplicates"].append(f"{origin[name]} and {key}")
            found[name], origin[name] = value, key
    state, frozen = module.network.state_dict(), module.frozen_parameters()
    own = {name: value for name, value in state.items() if not name.startswith("diffusion.vae.")}
    problems["missing"] += own.keys() - found
    problems["unexpected"] += (origin[name] for name in found.keys() - own)
    for name in own.keys() & found:
        value, size = found[name], own[name].shape
        if value.squeeze().shape != own[name].squeeze().shape:  # a linear layer may become a 1x1 convolution
            problems["mismatched"].append(f"{origin[name]} (file {list(value.shape)}, model {list(size)})")
            continue
        state[name] = value.reshape(size).to(own[name].dtype)
        if f"network.{name}" in frozen and not torch.equal(state[name], own[name]):
            problems["frozen, but not as in the base model"].append(origin[name])
    if told := "; ".join(f"{kind}: {name_some(keys)}" for kind, keys in problems.items() if keys):
        raise ValueError(
            f"The checkpoint does not fit the config's model. Found {told}. Give the config of the same "
            "experiment and the same base model."
        )
    module.network.load_state_dict(state)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", type=Path, help="checkpoint of the authors' code, or .safetensors")
    parser.add_argument("--config", nargs="+", required=True, help="of the experiment, and overlays")
    parser.add_argument("--output", type=Path, required=True, help="run folder to write")
    parser.add_argument("--allow-pickle", action="store_true", help="may run code that the file holds")
    args, overrides = parser.parse_known_args(argv)
    words = [word for path in args.config for word in ("--config", path)] + overrides
    check_configs(words)
    if (args.output / "checkpoints").exists():
        raise UsageError(f"the folder {args.output} holds a run.\nChoose another by --output DIR.")
    config = SegmentationCLI(words, build=False).resolved()
    weights, step = read_checkpoint(args.file, args.allow_pickle)
    module, _ = build({"model": config["model"]})
    with edge_errors():
        fill(module, weights)
    text = yaml.safe_dump(redact(config, secret_values(config)), sort_keys=False, allow_unicode=True)
    checkpoint = {"config": text, "global_step": step, "state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    AtomicCheckpointIO().save_checkpoint(checkpoint, args.output / "checkpoints" / "last.ckpt")
    print(f"{len(weights)} tensors read. The run is in {args.output}: python test.py {args.output}")


if __name__ == "__main__":
    with short_errors():
        main()
