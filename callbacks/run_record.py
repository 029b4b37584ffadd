"""The record of a run: its configs, versions, seeds, status and latest metrics, kept in its folder."""

import json
import math
import os
import platform
import re
import shlex
import subprocess
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import yaml
from lightning.pytorch import Callback

from callbacks.provenance import device_state, list_hashes
from functional.fingerprint import weights_sha256

LIBRARIES = [
    *("torch", "lightning", "torchmetrics", "diffusers", "transformers", "accelerate", "xformers"),
    *("safetensors", "albumentations", "opencv-python-headless", "numpy", "pillow"),
    *("omegaconf", "jsonargparse", "wandb"),
]
REDACTED = "REDACTED"
# What wandb shows of run.json, beside the config.
SHOWN = ("git", "data_lists", "weights", "versions", "gpu_driver", "gpus", "determinism", "world_size")


def is_secret(name: str) -> bool:
    """Whether a key of this name holds a secret: api_key, hfToken, DB_PASSWORD; not tokenizer, keypoints."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(name)).lower()
    return bool(re.search(r"secret|passw(or)?d|(key|token)s?([^a-z]|$)", words))


def redact(value, secrets: Iterable[str] = ()):
    """Copy nested plain data with the values of secret keys, credentials in URLs and known secrets replaced.

    A number under a name such as num_tokens is a size and stays; under password or secret it goes.

    Args:
        value: dicts, lists and plain values.
        secrets: texts to replace wherever they occur.
    """
    if isinstance(value, dict):
        return {k: _hide(v, k) if is_secret(k) else redact(v, secrets) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v, secrets) for v in value]
    return redact_text(value, secrets) if isinstance(value, str) else value


def _hide(value, name: str):
    if isinstance(value, dict):
        return {k: _hide(v, name) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(v, name) for v in value]
    is_size = isinstance(value, bool | int | float) and not re.search("secret|passw", str(name).lower())
    return value if value is None or is_size else REDACTED


def secret_values(value, name: str = "") -> set[str]:
    """Return the texts of 6 or more letters that stand under secret keys."""
    if isinstance(value, dict):
        return set().union(*(secret_values(v, k if not is_secret(name) else name) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return set().union(*(secret_values(v, name) for v in value))
    return (
        {value}
        if isinstance(value, str) and is_secret(name) and len(value) >= 6 and "${" not in value
        else set()
    )


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Replace known secrets, those of the environment, `api_key: value` and URL credentials in free text."""
    environment = {v for k, v in os.environ.items() if is_secret(k) and len(v) >= 8 and not os.path.exists(v)}
    for secret in sorted({*secrets, *environment}, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    text = re.sub(r"(\w+://)[^/\s@\"']+@", rf"\1{REDACTED}@", text)

    def hide(match: re.Match) -> str:
        plain = match[3].strip().strip("\"'")
        if (
            not is_secret(match[1])
            or "${" in plain
            or isinstance(_hide(yaml_value(plain), match[1]), int | float)
        ):
            return match[0]
        return f"{match[1]}{match[2]}{REDACTED}"

    return re.sub(r"([\w.-]+)(\"?'?\s*[:=][ \t]*)(\"[^\"\n]*\"|'[^'\n]*'|[^,}\s#{\[][^,}\n#]*)", hide, text)


def yaml_value(text: str):
    """Read one plain value; text that is no YAML stays text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def redact_command(words: list[str], secrets: Iterable[str] = ()) -> list[str]:
    """Redact the words of a command line, also `--data.password VALUE`."""
    clean = [redact_text(word, secrets) for word in words]
    for i, word in enumerate(words[:-1]):
        if word.startswith("--") and "=" not in word and is_secret(word):
            clean[i + 1] = REDACTED
    return clean


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def git_state(folder: Path) -> dict:
    """Return {"commit", "dirty"} of the checkout around a folder; None for both where git does not answer."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that can change a result, as far as they are installed."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def nest_metrics(flat: dict[str, float], stage: str) -> dict:
    """Sort logged names into sets.

    Args:
        flat: values under `stage/mIoU`, `stage/set/mIoU` and `stage/set/IoU/class`; other names are left out.
        stage: "val" or "test".

    Returns:
        {"mean": {"mIoU": ...}, "sets": {set: {"mIoU": ..., "IoU": {class: ...}}}}; NaN is None.
    """
    nested: dict = {"mean": {}, "sets": {}}
    for name, value in flat.items():
        parts = name.split("/", 3)
        value = float(value)
        value = value if math.isfinite(value) else None
        if parts[0] != stage or len(parts) < 2:
            continue
        if len(parts) == 2:
            nested["mean"][parts[1]] = value
        elif parts[1] == "IoU" and len(parts) == 3:
            nested["mean"].setdefault("IoU", {})[parts[2]] = value
        elif len(parts) == 3:
            nested["sets"].setdefault(parts[1], {})[parts[2]] = value
        else:
            nested["sets"].setdefault(parts[1], {}).setdefault(parts[2], {})[parts[3]] = value
    return nested


def metrics_table(nested: dict) -> str:
    """Return a Markdown table: a row for each class and mean score, a column for each set and their mean."""
    sets = dict(nested["sets"])
    if len(sets) > 1 or not sets:
        sets["mean"] = nested["mean"]
    classes = list(dict.fromkeys(c for scores in nested["sets"].values() for c in scores.get("IoU", {})))
    summary = list(
        dict.fromkeys(k for scores in sets.values() for k, v in scores.items() if not isinstance(v, dict))
    )

    def cell(value) -> str:
        return "-" if value is None else f"{value:.2f}"

    def row(title: str, values) -> str:
        return f"| {title} | " + " | ".join(values) + " |"

    def class_iou(scores: dict, name: str) -> float | None:
        if "IoU" in scores:
            return scores["IoU"].get(name)
        present = [s["IoU"][name] for s in nested["sets"].values() if s.get("IoU", {}).get(name) is not None]
        return sum(present) / len(present) if present else None

    lines = [row("IoU (%)", sets), "|--|" + "--:|" * len(sets)]
    lines += [row(name, (cell(class_iou(scores, name)) for scores in sets.values())) for name in classes]
    lines += [row(f"**{key}**", (cell(scores.get(key)) for scores in sets.values())) for key in summary]
    return "\n".join(lines) + "\n"


def write_metrics(folder: Path, latest: dict) -> None:
    """Write metrics.json and metrics.md; `latest` holds {"step", "mean", "sets"} under "val" and "test".

    Texts beside these, which tell what the scores were given, stand in the heading of metrics.md.
    """
    write_atomically(folder / "metrics.json", json.dumps(latest, indent=2) + "\n")
    parts = []
    for stage, scores in latest.items():
        terms = "".join(f", {name}: {text}" for name, text in scores.items() if isinstance(text, str))
        parts.append(f"## {stage}, step {scores['step']}{terms}\n\n{metrics_table(scores)}")
    write_atomically(folder / "metrics.md", "\n".join(parts))


class RunRecord(Callback):
    """Keeps the record of a training run in its folder, and shows it in wandb; only the first rank writes.

    Beside configs, versions, git state and status it holds hashes, by which two runs are known to have begun
    with the same data lists and weights: of the frozen ones by part, once the first checkpoint has computed
    them, and one of all others before the first step. It asks the LightningModule for `frozen_parameters()`
    and `frozen_digests`.

    Args:
        folder: the run folder.
        config_given: text of the config files as the user gave them.
        config: the resolved config, plain data.
        command: words of the command line.
        seed: what seeded python, numpy and torch.
        wandb_id: id under which a resumed run goes on in wandb.
    """

    def __init__(
        self,
        folder: str | Path,
        config_given: str,
        config: dict,
        command: list[str],
        seed: int,
        wandb_id: str,
    ):
        self.folder = Path(folder)
        self.secrets = secret_values(config)
        self.config = yaml.safe_dump(redact(config, self.secrets), sort_keys=False, allow_unicode=True)
        self.command = redact_command(command, self.secrets)
        self.config_given = f"# {shlex.join(self.command)}\n{redact_text(config_given, self.secrets)}"
        self.run = {
            "command": self.command,
            "status": "starting",
            "started": _now(),
            "ended": None,
            "seed": seed,
            "wandb_id": wandb_id,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            "versions": library_versions(),
            "git": git_state(Path(__file__).parent),
        }
        self.latest: dict = {}
        self.begun = False  # whether a first batch has been asked for
        self.weights: dict = {}

    def setup(self, trainer, pl_module, stage: str) -> None:
        """Write configs and run.json before the first step; a resumed run keeps what was there."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = _read_json(self.folder / "run.json")
        if earlier:
            kept = ("started", "ended", "status", "command", "git")
            self.run["earlier"] = [*earlier.get("earlier", []), {k: earlier.get(k) for k in kept}]
        if any((self.folder / "checkpoints").glob("*.ckpt")):  # the run goes on
            self.weights = earlier.get("weights", {})
        else:
            frozen = pl_module.frozen_parameters()
            learned = {name: w for name, w in pl_module.state_dict().items() if name not in frozen}
            self.weights = {"initial": weights_sha256(learned)}
        self.latest = _read_json(self.folder / "metrics.json")
        write_atomically(self.folder / "config_as_given.yaml", self.config_given)
        write_atomically(self.folder / "config.yaml", self.config)
        devices = [str(device) for device in getattr(trainer.strategy, "parallel_devices", None) or []]
        self.run |= {
            "devices": devices or [str(trainer.strategy.root_device)],
            "world_size": trainer.world_size,
            **device_state(),
        }
        self._write_run(trainer, "running")

    def on_train_start(self, trainer, pl_module) -> None:
        """Note that data and weights have passed their checks, and what data there is."""
        self.begun = True
        if trainer.is_global_zero:
            names = trainer.datamodule.val_set_names if trainer.val_dataloaders else []
            loaders = dict(zip((f"val/{name}" for name in names), trainer.val_dataloaders or [], strict=True))
            loaders = {"train": trainer.train_dataloader, **loaders}
            self.run["data_lists"] = list_hashes({name: each.dataset for name, each in loaders.items()})
            self._write_run(trainer, "running")

    def on_validation_end(self, trainer, pl_module) -> None:
        """Keep the latest validation."""
        if not trainer.sanity_checking:
            self._keep_metrics(trainer, "val")
            self._write_run(trainer, "running")

    def on_test_end(self, trainer, pl_module) -> None:
        """Keep the latest test."""
        self._keep_metrics(trainer, "test")

    def on_fit_end(self, trainer, pl_module) -> None:
        """Mark the run as finished, or as stopped where it ended before its last step."""
        done = trainer.max_steps < 0 or trainer.global_step >= trainer.max_steps
        self._write_run(trainer, "finished" if done else "stopped")

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        """Mark the run as stopped by a signal, interrupted, or failed with the first line of the reason."""
        reason = (str(exception).splitlines() or [""])[0]
        signal = getattr(exception, "signal_name", None)
        status = f"failed: {type(exception).__name__}: {reason}"
        if signal is not None:
            status = f"stopped by {signal}"
        elif isinstance(exception, KeyboardInterrupt):
            status = "interrupted"
        self._write_run(trainer, redact_text(status, self.secrets))
        if signal == "SIGUSR1":  # the one after which the job is queued again
            for logger in self._wandb_runs(trainer):
                logger.mark_preempting()

    def _keep_metrics(self, trainer, stage: str) -> None:
        nested = nest_metrics(trainer.callback_metrics, stage)
        if trainer.is_global_zero and (nested["sets"] or nested["mean"]):
            self.latest[stage] = {"step": trainer.global_step, **nested}
            with a_failure_is_a_warning():
                write_metrics(self.folder, self.latest)

    def _write_run(self, trainer, status: str) -> None:
        if trainer.is_global_zero and self.folder.is_dir():
            ended = None if status == "running" else _now()
            # The frozen weights are hashed by the first checkpoint, and only there.
            frozen = getattr(trainer.lightning_module, "frozen_digests", {})
            self.weights |= {"frozen": frozen} if frozen else {}
            self.run |= {
                "status": status,
                "step": trainer.global_step,
                "ended": ended,
                "weights": self.weights,
            }
            with a_failure_is_a_warning():
                write_atomically(self.folder / "run.json", json.dumps(self.run, indent=2) + "\n")
            for logger in self._wandb_runs(trainer):
                logger.show({key: self.run[key] for key in SHOWN if key in self.run})

    def _wandb_runs(self, trainer) -> list:
        return [logger for logger in trainer.loggers if hasattr(logger, "show")]


@contextmanager
def a_failure_is_a_warning(what: str = "The record of the run"):
    """Let a run outlive a full disk: what the record lacks then is in its checkpoints."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{what} could not be written: {error}. The run goes on.", stacklevel=4)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
