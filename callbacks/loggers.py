"""Where numbers go: metrics.csv, which a resumed run continues, and wandb, whose failures never end a run."""

import csv
import os
import warnings
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from callbacks.run_record import write_atomically


class MetricsCSV(Logger):
    """Writes metrics.csv: one row for each logged step, one column for each name.

    Rows from before this start are kept up to the step where training goes on, so a step that is computed
    again after a resume appears once.
    """

    def __init__(self, folder: str | Path, flush_every: int = 50):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.flush_every = flush_every
        self.rows: dict[int, dict[str, Any]] | None = None
        self.unsaved = 0

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
        step = 0 if step is None else step
        if self.rows is None:
            self.rows = {s: row for s, row in self._read().items() if s <= step}
        row = self.rows.setdefault(step, {"step": step})
        row |= {k: float(v) for k, v in metrics.items() if k != "epoch"}
        self.unsaved += 1
        if self.unsaved >= max(self.flush_every, len(self.rows) // 10):  # rewriting stays linear in the end
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged."""
        if not self.unsaved or not self.rows or not self.path.parent.is_dir():
            return
        names = ["step", *sorted({name for row in self.rows.values() for name in row} - {"step"})]
        lines = [",".join(names)]
        lines += [",".join(str(row.get(name, "")) for name in names) for _, row in sorted(self.rows.items())]
        write_atomically(self.path, "\n".join(lines) + "\n")
        self.unsaved = 0

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rest at the end of training, also after an exception."""
        self.save()

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
        project, entity, name, tags: as in wandb.init.
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
        tags: list[str] | None = None,
        run_id: str | None = None,
        config: dict | None = None,
        hide_command: bool = False,
    ):
        super().__init__(project=project, save_dir=folder)
        self.mode = mode
        if mode == "auto":
            self.mode = os.environ.get("WANDB_MODE") or ("online" if wandb_key_exists() else "offline")
        self.options = {
            "project": project, "entity": entity, "name": name, "tags": tags, "id": run_id, "config": config,
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
            disable_git=True, console="off", x_disable_meta=self.hide_command, init_timeout=30
        )
        run = wandb.init(mode=mode, settings=settings, **self.options)
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run

    @rank_zero_only
    def log_metrics(self, metrics, step: int | None = None) -> None:
        """Log numbers (and media); a failure is a warning."""
        self._attempt("logging to wandb", super().log_metrics, metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """The redacted config is sent at the start; module hyper-parameters are not."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run, so that another one can start in this process."""
        if self.run is not None:
            self._attempt("closing wandb", self.run.finish, 0 if status == "success" else 1)
            self.run = None

    def _attempt(self, doing: str, function, *args) -> None:
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
