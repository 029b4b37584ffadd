"""What a result can depend on beside code and config: devices, switches of PyTorch, lists of data."""

import hashlib
import subprocess
from collections.abc import Sequence
from contextlib import suppress

import torch


def device_state() -> dict:
    """Return what of this process's devices and settings can change the last bits of a result.

    Returns:
        {"gpu_driver", "gpus"}, None without CUDA, and {"determinism": {...}}: PyTorch's switches.
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    backends, precision = torch.backends, None
    with suppress(RuntimeError):  # where somebody set it by fp32_precision, the old name cannot be read
        precision = torch.get_float32_matmul_precision()
    return {
        "gpu_driver": gpu_driver() if gpus else None,
        "gpus": gpus or None,
        "determinism": {
            "use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn.deterministic": backends.cudnn.deterministic,
            "cudnn.benchmark": backends.cudnn.benchmark,
            "float32_matmul_precision": precision,
            "matmul.allow_tf32": backends.cuda.matmul.fp32_precision == "tf32",
            "cudnn.allow_tf32": backends.cudnn.conv.fp32_precision == "tf32",
        },
    }


def gpu_driver() -> str | None:
    """Return the version of NVIDIA's driver, None where nvidia-smi does not answer."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.split() or [None])[0]


def sample_lists(dataset, name: str) -> dict[str, Sequence | None]:
    """Return by what the samples of a dataset are known, in their order, without reading any of them.

    Args:
        dataset: is looked into for `episodes`, `pairs` of files, `label_names` or a method `name` of an
            index, through what wraps it (`dataset`) or joins two (`source` and `target`).
        name: of the list; those of a joined dataset are name/source and name/target.

    Returns:
        A list by name; None for samples without names.
    """
    if hasattr(dataset, "source") and hasattr(dataset, "target"):
        return {
            **sample_lists(dataset.source, f"{name}/source"),
            **sample_lists(dataset.target, f"{name}/target"),
        }
    if hasattr(dataset, "episodes"):
        named = dataset.images.name
        return {name: [(named(e.query), e.class_id, *map(named, e.supports)) for e in dataset.episodes]}
    for attribute in ("pairs", "label_names"):
        if hasattr(dataset, attribute):
            return {name: getattr(dataset, attribute)}
    if callable(getattr(dataset, "name", None)):
        return {name: [dataset.name(i) for i in range(len(dataset))]}
    if hasattr(dataset, "dataset"):
        return sample_lists(dataset.dataset, name)
    return {name: None}


def list_hashes(datasets: dict) -> dict[str, str | None]:
    """SHA-256 over names and order of the samples of each dataset; None where they have no names.

    It sees names below a data root, no root, and no content of a file. What a dataset makes of them (size,
    augmentation, style of a rendered scene) stands in the config. Samples that training draws by chance, as
    episodes, are known by the images that they are drawn from.
    """
    lists = [sample_lists(dataset, name) for name, dataset in datasets.items()]
    return {
        name: None if names is None else hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()
        for found in lists
        for name, names in found.items()
    }
