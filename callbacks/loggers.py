"""Where numbers go: metrics.csv, which a resumed run continues, and wandb, whose failures never end a run."""

import csv
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from callbacks.run_record import write_atomically

START_TIMEOUT = 30  # seconds after which a wandb that does not answer is given up at the start
FINISH_TIMEOUT = 120  # and at the end, where wandb by itself tries for days; what is left can be synced


class MetricsCSV(Logger):
    """Writes metrics.csv: one row for each logged step, one column for each name.

    `step` is the number of steps done, 1 in the row of the first, as in run.json and metrics.md; Lightning
    counts from 0. So does WandbRun.

    Rows from before this start are kept up to the step where training goes on, so a step that is computed
    again after a resume appears once. Writing takes at most a twentieth of the time, so rows of the last
    moments may be missing after a kill; none are that belong to a checkpoint.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.rows: dict[int, dict[str, Any]] | None = None
        self.unsaved = self.failed = False
        self.wait_until = 0.0  # before the next writing

    @property
    def name(self) -> str:
        """Name that Lightning asks for."""
        return "csv"

    @property
    def version(self) -> str:
        """Version that Lightning asks for."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """The run record keeps the config; nothing is written here."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add the numbers of one step to its row."""
        step = 0 if step is None else step + 1
        if self.rows is None:
            self.rows = {s: row for s, row in self._read().items() if s <= step}
        row = self.rows.setdefault(step, {"step": step})
        row |= {k: float(v) for k, v in metrics.items() if k != "epoch"}
        self.unsaved = True

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged, unless that was done a moment ago; Lightning calls this after each step."""
        if time.monotonic() >= self.wait_until:
            self.write()

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback) -> None:
        """Write what was logged, and soon that of the saved step, which Lightning logs after it."""
        self.write()
        self.wait_until = 0.0

    def write(self) -> None:
        """Write all rows; a failure is a warning, once."""
        if not self.unsaved or not self.rows or not self.path.parent.is_dir():
            return
        started = time.monotonic()
        names = ["step", *sorted({name for row in self.rows.values() for name in row} - {"step"})]
        lines = [",".join(names)]
        lines += [",".join(str(row.get(name, "")) for name in names) for _, row in sorted(self.rows.items())]
        try:
            write_atomically(self.path, "\n".join(lines) + "\n")
            self.unsaved = False
        except OSError as error:
            if not self.failed:
                warnings.warn(f"{self.path} could not be written: {error}. The run goes on.", stacklevel=2)
            self.failed = True
        self.wait_until = time.monotonic() + 20 * (time.monotonic() - started)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rest at the end of training, also after an exception."""
        self.write()

    def _read(self) -> dict[int, dict[str, Any]]:
        if not self.path.is_file():
            return {}
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = [{k: v for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(file)]
        return {int(row["step"]): row for row in rows if "step" in row}


def wandb_key_exists() -> bool:
    """Whether this machine has a wandb key, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc().authenticators("api.wandb.ai") is not None
    except (OSError, NetrcParseError, KeyError):
        return False


def experiment_name(folder: Path, seed: int) -> str:
    """Name of a run folder without the run's seed at its end: madm-seed3, madm-3 and madm/seed3 are madm."""
    parts = (folder.parent.name, folder.name)
    names = [re.sub(rf"(^|[-_.])(seed)?[-_.=]?{seed}$", "", part) for part in parts]
    return names[1] or names[0] or folder.name


def method_and_data(config: dict) -> list[str]:
    """Names of the model's class and of the DataModules in a config, without the word: tags of a run."""

    def data_classes(node) -> Iterator[str]:
        for value in node.values() if isinstance(node, dict) else node:
            if isinstance(value, dict | list):
                yield from data_classes(value)
            elif isinstance(value, str) and re.fullmatch(r"[\w.]+\.\w+DataModule", value):
                yield value.rpartition(".")[2].removesuffix("DataModule")

    method = config.get("model", {}).get("class_path", "").rpartition(".")[2]
    return list(dict.fromkeys(filter(None, [method, *data_classes(config.get("data", {}))])))


class _Nothing:
    """Stands in for a wandb run that could not start: accepts every call and attribute and does nothing."""

    def __getattr__(self, name: str):
        return _Nothing()

    def __call__(self, *args, **kwargs):
        return _Nothing()


class WandbRun(WandbLogger):
    """A wandb run in the run folder; online with a key, else offline; trouble with wandb is a warning, once.

    Args:
        folder: run folder; wandb writes into its subfolder wandb/.
        mode: "auto" is online where the machine has a key and offline elsewhere.
        project, entity, name, group, job_type: as in wandb.init.
        tags: as there; the config's method and data sets follow them.
        run_id: id under which a resumed run goes on.
        config: redacted config to show with the run.
        hide_command: keep the command line out of wandb's metadata, because it holds a secret.
    """

    def __init__(
        self,
        folder: str | Path,
        mode: Literal["auto", "online", "offline"] = "auto",
        project: str = "latentseg",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str = "train",
        tags: list[str] | None = None,
        run_id: str | None = None,
        config: dict | None = None,
        hide_command: bool = False,
    ):
        super().__init__(project=project, save_dir=folder)
        self.mode = mode
        if mode == "auto":
            self.mode = os.environ.get("WANDB_MODE") or ("online" if wandb_key_exists() else "offline")
        tags = list(dict.fromkeys([*(tags or []), *method_and_data(config or {})]))
        self.options = {
            "project": project, "entity": entity, "name": name, "group": group, "job_type": job_type,
            "tags": tags, "id": run_id, "config": config,
            # Absolute, because wandb writes in a process of its own, whose working directory may differ.
            "dir": str(Path(folder).resolve()), "resume": "allow",
        }  # fmt: skip
        self.hide_command = hide_command
        self.run = None
        self.broken = False

    @property
    @rank_zero_experiment
    def experiment(self):
        """The wandb run; offline where online fails; a stand-in that does nothing where both fail."""
        if self.run is None:
            for mode in dict.fromkeys([self.mode, "offline"]):
                try:
                    self.run = self._start(mode)
                    return self.run
                except Exception as error:  # whatever wandb raises must not end a training
                    self._warn(f"starting wandb in mode {mode!r}", error)
            self.run = _Nothing()
        return self.run

    def _start(self, mode: str):
        import wandb

        # The git remote may hold credentials, the console what a config resolves to: neither is sent.
        settings = wandb.Settings(
            disable_git=True,
            console="off",
            x_disable_meta=self.hide_command,
            init_timeout=START_TIMEOUT,
            login_timeout=START_TIMEOUT,  # of the question for a key
            finish_timeout=FINISH_TIMEOUT,
        )
        try:
            run = wandb.init(mode=mode, settings=settings, **self.options)
        except Exception:
            wandb.teardown()  # its own process would keep the run's id in use, and refuse the next start
            raise
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run

    @rank_zero_only
    def log_metrics(self, metrics, step: int | None = None) -> None:
        """Log numbers (and media); a failure is a warning."""
        done = None if step is None else step + 1
        self.attempt("logging to wandb", super().log_metrics, metrics, done)

    @rank_zero_only
    def log_image(self, key: str, images: list, step: int | None = None) -> None:
        """Log pictures; a failure, also in writing them for wandb, is a warning."""
        self.attempt("drawing for wandb", super().log_image, key, images, step)

    @rank_zero_only
    def show(self, facts: dict) -> None:
        """Add to the config that wandb shows, under `record`, what is known about the run by now."""
        change = {"record": facts}
        self.attempt("logging to wandb", lambda: self.experiment.config.update(change, allow_val_change=True))

    @rank_zero_only
    def summarize(self, values: dict[str, float]) -> None:
        """Set numbers that stand for the whole run."""
        self.attempt("logging to wandb", lambda: self.experiment.summary.update(values))

    @rank_zero_only
    def mark_preempting(self) -> None:
        """Tell wandb that the run ends here to go on in another start."""
        self.attempt("logging to wandb", lambda: self.experiment.mark_preempting())

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """The redacted config is sent at the start; module hyper-parameters are not."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run, so that another one can start in this process."""
        if self.run is not None:
            self.attempt("closing wandb", self.run.finish, 0 if status == "success" else 1)
            self.run = None

    def attempt(self, doing: str, function: Callable, *args) -> None:
        """Call a function; what it raises becomes the one warning that a run gives about wandb."""
        try:
            function(*args)
        except Exception as error:  # whatever wandb raises must not end a training
            self._warn(doing, error)

    def _warn(self, doing: str, error: Exception) -> None:
        if not self.broken:
            reason = (str(error).splitlines() or [""])[0]
            message = f"{doing} failed ({type(error).__name__}: {reason}): training goes on with metrics.csv."
            warnings.warn(message, stacklevel=3)
        self.broken = True
