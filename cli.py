"""The command line: one subclass of LightningCLI, and models built from what a run left."""

import importlib
import json
import os
import secrets
import signal
import sys
import tempfile
from argparse import ArgumentError
from pathlib import Path
from typing import Literal

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from callbacks.checkpoints import Checkpoints, SaveError
from callbacks.failures import describe
from callbacks.finite import Finite, NotFiniteError
from callbacks.loggers import MetricsCSV, WandbRun, experiment_name
from callbacks.predictions import Predictions
from callbacks.preemption import SIGNALS, Preempted, Preemption
from callbacks.progress import Progress
from callbacks.run_record import RunRecord, redact_command
from config_files import RunFailed, UsageError, config_paths, parse_yaml, read_yaml
from lightning_modules.batch_norm import SyncBatchNorm
from mistakes import edge_errors, explain
from run_folder import RunLock, check_unchanged, checkpoint_path, load_checkpoint, open_run_folder

# A step is the clock: the loaders never end, so there are no epochs; and their samplers know the ranks.
TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "log_every_n_steps": 10,
}


class SegmentationCLI(LightningCLI):
    """Parses config files and overrides; builds DataModule, LightningModule and Trainer.

    Args:
        args: words of the command line without the program.
        build: False only parses.
    """

    def __init__(self, args: list[str], build: bool = True):
        self.build = build
        self.args = args
        self.lock: RunLock | None = None
        try:
            self.parse_and_build()
        except BaseException:
            self.release()
            raise

    def parse_and_build(self) -> None:
        """Do all that LightningCLI does when it is made."""
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"parser_mode": "omegaconf+", "exit_on_error": False, "allow_abbrev": False},
            args=self.args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def release(self) -> None:
        """Let others use the run folder."""
        if self.lock is not None:
            self.lock.release()

    def add_arguments_to_parser(self, parser) -> None:
        """Add the run folder, wandb and the callbacks that every run has; each is a section of the YAML."""
        parser.add_argument(
            "--output", type=str | None, default=None, help="run folder, default runs/<config name>"
        )
        parser.add_argument(
            "--resume", action="store_true", help="go on from the last checkpoint of the folder"
        )
        parser.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds")
        parser.add_argument(
            "--data_faults",
            type=Literal["error", "skip"],
            default="error",
            help="of training samples that cannot be read: error, or skip puts others in their place",
        )
        modes = Literal["auto", "online", "offline", "disabled"]
        parser.add_argument(
            "--wandb.mode", type=modes, default="auto", help="auto: online with a key, else offline"
        )
        parser.add_argument("--wandb.project", type=str, default="latentseg")
        parser.add_argument("--wandb.entity", type=str | None, default=None)
        parser.add_argument(
            "--wandb.name", type=str | None, default=None, help="default: name of the run folder"
        )
        parser.add_argument("--wandb.tags", type=list[str], default=[])
        parser.add_argument(
            "--wandb.group", type=str | None, default=None, help="default: run folder without its seed"
        )
        parser.add_argument("--wandb.job_type", type=str, default="train")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(Finite, "finite")
        parser.add_lightning_class_args(Predictions, "predictions")
        parser.add_lightning_class_args(Progress, "progress")

    def parse_arguments(self, parser, args) -> None:
        """Parse, with mistakes as UsageError."""
        try:
            self.config = parser.parse_args(args)
        except (ArgumentError, OmegaConfBaseException) as error:
            known = list(parser.get_defaults().keys())
            raise UsageError(explain(str(error), known, args)) from None

    def check_trains(self) -> None:
        """Refuse what no training can come of.

        Raises:
            UsageError: the method does not train, the run would never end, or keep no checkpoints.
        """
        trainer = self.config.trainer
        module, _, name = self.config.model.class_path.rpartition(".")
        if not getattr(getattr(importlib.import_module(module), name), "trains", True):
            raise UsageError(
                f"{name} has nothing to train.\nScore it by `python test.py --config FILE`, or predict by "
                "`python predict.py --config FILE --input PATH`."
            )
        if trainer.max_steps < 1 and trainer.max_time is None and not trainer.fast_dev_run:
            raise UsageError(
                "trainer.max_steps is not set, so training would never end.\n"
                "Set it, e.g. --trainer.max_steps 4000."
            )
        if trainer.enable_checkpointing is False:
            raise UsageError(
                "trainer.enable_checkpointing (given: false): a run always keeps its checkpoints.\n"
                "Leave it out; --trainer.fast_dev_run true tries a run and keeps nothing."
            )

    def before_instantiate_classes(self) -> None:
        """Open the run folder, before any class is built."""
        if not self.build:
            return
        self.check_trains()
        trainer, paths = self.config.trainer, config_paths(self.args)
        if str(trainer.strategy).startswith("fsdp"):
            raise UsageError(
                f"trainer.strategy {trainer.strategy} is Lightning's, which does not know these methods.\n"
                "Add --config conf/fsdp.yaml instead."
            )
        self.folder = Path(self.config.output or Path("runs") / (paths[0].stem if paths else "unnamed"))
        if trainer.fast_dev_run:
            if self.config.resume or self.config.overwrite:
                raise UsageError(
                    "trainer.fast_dev_run tries a fresh start and keeps nothing.\n"
                    "Leave out --resume and --overwrite."
                )
            self.trial = tempfile.TemporaryDirectory()  # after an exception, deleted with this object
            self.folder = Path(self.trial.name)
        self.lock = RunLock(self.folder)
        self.checkpoint = open_run_folder(self.lock, self.config.resume, self.config.overwrite)
        if trainer.val_check_interval is None and trainer.max_steps > 0:
            trainer.val_check_interval = max(1, trainer.max_steps // 10) * trainer.accumulate_grad_batches
        elif isinstance(trainer.val_check_interval, int) and trainer.max_steps > 0:
            # A short trial of a long experiment still ends with a validation.
            last = trainer.max_steps * trainer.accumulate_grad_batches
            trainer.val_check_interval = min(trainer.val_check_interval, last)

    def instantiate_classes(self) -> None:
        """Build the objects, unless the run has reached its last step."""
        self.finished_at = None
        if not self.build:
            return
        if self.checkpoint:
            checkpoint = load_checkpoint(self.checkpoint, sound=True)  # open_run_folder has looked
            if "optimizer_states" not in checkpoint:
                raise UsageError(
                    f"{self.checkpoint} holds weights only, so its training cannot go on.\n"
                    "Score it with test.py, or train a new run in another --output."
                )
            check_unchanged(
                parse_yaml(checkpoint["config"], f"the config in {self.checkpoint}"), self.resolved()
            )
            step = checkpoint["global_step"]
            validated = not checkpoint["callbacks"]["Checkpoints"]["validation_due"]
            if 0 < self.config.trainer.max_steps <= step and validated:
                self.finished_at = step
                return
        with edge_errors():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs):
        """Build the Trainer with the loggers, the run record and the callbacks of the parser."""
        config, command = self.resolved(), ["python", "train.py", *self.args]
        given = "".join(f"# --- {path}\n{path.read_text('utf-8')}\n" for path in config_paths(self.args))
        seed, wandb_id = self.config.seed_everything, self._wandb_id()
        self.record = record = RunRecord(self.folder, given, config, command, seed, wandb_id)
        # From this text test.py and predict.py build the model again.
        self.config_init.checkpoints.config_text = record.config
        loggers, extra = [], [record, Preemption()]
        if self.config.trainer.logger is not False:
            loggers = [MetricsCSV(self.folder), *self._wandb_runs(record)]
            extra.append(LearningRateMonitor("step"))
        if self.config.trainer.enable_progress_bar is False:
            self.parser.callback_keys.remove("progress")
        self.trainer_defaults = {**TRAINER_DEFAULTS, "callbacks": extra}
        if self.config.trainer.sync_batchnorm:
            kwargs["plugins"] = [*(self.config_init.trainer.plugins or []), SyncBatchNorm()]
        return super().instantiate_trainer(logger=loggers, default_root_dir=str(self.folder), **kwargs)

    def fit(self) -> None:
        """Train; what data and weights complain about before the first step is shown without a traceback."""
        check_classes(self.model, self.datamodule)
        self.datamodule.unreadable = self.config.data_faults
        try:
            with edge_errors(over=lambda: self.record.begun):
                self.trainer.fit(
                    self.model, datamodule=self.datamodule, ckpt_path=self.checkpoint, weights_only=True
                )
        except UsageError:
            raise
        except SystemExit:  # Lightning's after Ctrl-C, before it is listened to
            raise KeyboardInterrupt from None
        except (SaveError, NotFiniteError) as error:
            raise RunFailed(str(error)) from error
        except Exception as error:
            if (told := describe(error, self.trainer)) is None:
                raise
            raise RunFailed(told) from error

    def resolved(self) -> dict:
        """Return the resolved config as plain data, without what only steers the start."""
        text = self.parser.dump(self.config, skip_validation=True, skip_none=False, format="yaml")
        return {k: v for k, v in yaml.safe_load(text).items() if k not in ("resume", "overwrite", "output")}

    def _wandb_id(self) -> str:
        try:
            return json.loads((self.folder / "run.json").read_text("utf-8"))["wandb_id"]
        except (OSError, ValueError, KeyError):
            return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)

    def _wandb_runs(self, record: RunRecord) -> list[WandbRun]:
        config = yaml.safe_load(record.config)  # redacted
        options = config["wandb"]
        if options["mode"] == "disabled":
            return []
        options["name"] = options["name"] or self.folder.name
        options["group"] = options["group"] or experiment_name(self.folder, record.run["seed"])
        hide_command = redact_command(sys.argv, record.secrets) != sys.argv
        run_id = record.run["wandb_id"]
        return [WandbRun(self.folder, **options, run_id=run_id, config=config, hide_command=hide_command)]


def train(args: list[str]) -> None:
    """Run one training from the words of a command line.

    A SIGUSR1 that comes while libraries and models are loaded is obeyed after the first step; other signals
    end the process then, since nothing would be lost.

    Raises:
        SystemExit: the run was stopped by a signal, see callbacks.preemption.EXIT_CODES.
    """
    SIGNALS.remember()
    SIGNALS.listen([signal.SIGUSR1])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    command = None
    try:
        command = SegmentationCLI(args)
        run(command)
    except Preempted as stop:
        if rank_zero_only.rank == 0:
            print(f"The run was {stop}. Go on with it by the same command and --resume.")
        # A launcher takes the others' code for a failure, and would end the first process half-way.
        raise SystemExit(stop.exit_code if rank_zero_only.rank == 0 else 0) from None
    finally:
        SIGNALS.restore()
        if command is not None:
            command.release()


def run(command: SegmentationCLI) -> None:
    """Train, unless the run has reached its last step already."""
    if command.finished_at is not None:
        print(
            f"{command.folder} has already finished: step {command.finished_at} is its last. "
            "Raise trainer.max_steps to go on."
        )
        return
    command.fit()
    if command.config.trainer.fast_dev_run:
        command.trial.cleanup()
        print("The trial (trainer.fast_dev_run) went through. Nothing was kept.")
        return
    if rank_zero_only.rank == 0:
        print(f"The run is in {command.folder}: metrics.md, metrics.json, checkpoints, pictures.")


def build(config: dict) -> tuple[LightningModule | None, LightningDataModule | None]:
    """Build what a resolved config has under model and data."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False, required=False)
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False, required=False)
    try:
        parsed = parser.parse_object({key: config[key] for key in ("model", "data") if config.get(key)})
    except ArgumentError as error:
        raise UsageError(explain(str(error), ["model", "data"], [], config)) from None
    with edge_errors():
        objects = parser.instantiate_classes(parsed)
    return objects.get("model"), objects.get("data")


def resolve(paths: list[Path]) -> dict:
    """Return the resolved config of one or several files, as plain data."""
    return SegmentationCLI(
        [word for path in paths for word in ("--config", str(path))], build=False
    ).resolved()


def resolve_data(path: Path) -> dict:
    """Return the section data of a file, with what it interpolates from the same file."""
    try:
        return OmegaConf.to_container(OmegaConf.create(read_yaml(path)), resolve=True)["data"]
    except OmegaConfBaseException as error:
        raise UsageError(f"{path}: {str(error).splitlines()[0]}.") from None


def for_this_device(options):
    """Options of a trained model; without CUDA, PyTorch's attention takes the place of xformers'."""
    if isinstance(options, list):
        return [for_this_device(each) for each in options]
    if not isinstance(options, dict) or torch.cuda.is_available():
        return options
    found = {key: for_this_device(value) for key, value in options.items()}
    return found | {"attention": "sdpa"} if found.get("attention") == "xformers" else found


def load_model(place: Path, which: str | None = None) -> tuple[LightningModule, dict, int, str]:
    """Build the model of a checkpoint and load its weights.

    Args:
        place: a run folder or a checkpoint file.
        which: for a folder "best", "last", a path, or None for the best there is.

    Returns:
        The model in eval mode, its resolved config, the step it was saved at, and the checkpoint's name.
    """
    if not place.exists():
        raise UsageError(f"there is no run folder or checkpoint {place}.")
    path = checkpoint_path(place, which) if place.is_dir() else place
    checkpoint = load_checkpoint(path)
    config = parse_yaml(checkpoint["config"], f"the config in {path}")
    model, _ = build({"model": for_this_device(config["model"])})
    restore(model, checkpoint)
    return model.eval(), config, checkpoint["global_step"], path.stem


def check_classes(model, datamodule) -> None:
    """Refuse data labelled by another class table than the model's.

    Raises:
        UsageError: names both tables.
    """
    expected, found = model.classes.name, getattr(datamodule, "classes", model.classes.name)
    if expected != found:
        raise UsageError(
            f"the model knows the class table {expected!r}, the data is labelled by {found!r}.\n"
            "Set the same table for both."
        )


def restore(model: LightningModule, checkpoint: dict) -> None:
    """Load the weights of a checkpoint; those it leaves out came with the model and are compared."""
    with edge_errors():
        model.on_load_checkpoint(checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UsageError(
            f"the checkpoint does not fit its model: {' '.join(str(error).split())[:400]}"
        ) from None
