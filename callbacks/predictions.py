"""Pictures and tables of each validation: what the numbers look like."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch import Callback

from callbacks.loggers import WandbRun
from callbacks.pictures import comparison, confusion_picture, sized_like, to_uint8, write_picture
from callbacks.run_record import a_failure_is_a_warning
from functional.classes import IGNORE_INDEX


class Predictions(Callback):
    """Draws the first images of each validation set with truth and prediction into <run>/pictures.

    The same images every time, and the latest validation's pictures replace those before. Where the run logs
    to wandb, they go there too (with masks to switch on and off by class), as do the IoU of each class and
    the confusion matrix of each set, and wandb's summary gets the scores of the best validation and of the
    last one: best/mIoU, best/<set>/mIoU, best/step, last/mIoU, ... The best is that of best.ckpt, by the
    monitored score of the checkpoints. It asks the LightningModule for `classes`, for `matrices` (of each
    set) and that `validation_step` returns class ids [B, H, W].

    Args:
        per_set: images of each set; 0 draws none.
    """

    def __init__(self, per_set: int = 2):
        self.per_set = per_set
        self.drawn: dict[str, list] = {}  # wandb's images of this validation, by set
        self.best: dict[str, float] = {}  # scores and step of the best validation so far

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.best = state["best"]

    def on_validation_start(self, trainer, pl_module) -> None:
        self.drawn = {}

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw images of this batch while the set has not had its share."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        set_name = list(pl_module.matrices)[dataloader_idx]
        drawn = self.drawn.setdefault(set_name, [])
        for i in range(min(self.per_set - len(drawn), len(outputs))):
            truth, prediction = (ids[i].cpu().numpy().astype(np.uint8) for ids in (batch["label"], outputs))
            image = sized_like(to_uint8(batch["image"][i]), prediction)  # wandb wants masks of its size
            table = pl_module.classes
            picture = comparison(image, truth, prediction, table.names, table.colors)
            name = re.sub(r"[^\w.-]+", "_", f"val-{set_name}-{batch['name'][i]}")
            with a_failure_is_a_warning("A picture"):
                write_picture(picture, Path(trainer.default_root_dir) / "pictures" / f"{name}.png")
            drawn.append((image, truth, prediction, batch["name"][i]))

    def on_validation_end(self, trainer, pl_module) -> None:
        """Send pictures and tables to wandb."""
        if trainer.sanity_checking:
            return
        last = self.keep_best(trainer)
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbRun):
                logger.attempt("drawing for wandb", self.send, logger, trainer, pl_module)
                scores = {"last": last, "best": self.best}
                logger.summarize(
                    {f"{of}/{name}": v for of, found in scores.items() for name, v in found.items()}
                )

    def keep_best(self, trainer) -> dict[str, float]:
        """Return the scores and the step of this validation, and keep them if it is the best so far."""
        scores = {
            name.removeprefix("val/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/") and "/IoU/" not in name
        }
        found = {"step": trainer.global_step, **scores}
        watching = [c for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None)]
        monitor, mode = (watching[0].monitor, watching[0].mode) if watching else ("val/mIoU", "max")
        monitored, sign = monitor.removeprefix("val/"), -1 if mode == "min" else 1
        score = sign * scores.get(monitored, float("nan"))
        if score == score and (not self.best or score > sign * self.best[monitored]):
            self.best = found
        return found

    def send(self, logger: WandbRun, trainer, pl_module) -> None:
        """Log what wandb shows of this validation."""
        media = wandb_media(pl_module.classes.names, pl_module.scored_names, pl_module.matrices, self.drawn)
        # The step under which Lightning logs the scores of this validation.
        logger.log_metrics(media, step=max(trainer.global_step - 1, 0))


def wandb_media(
    names: Sequence[str], scored_names: Sequence[str], matrices: dict, drawn: dict[str, list]
) -> dict:
    """Build what wandb shows of a validation.

    Args:
        names: of the classes in pictures.
        scored_names: of the classes in a metric's IoUs.
        matrices: confusion matrix of each set, computed.
        drawn: by set, (image, truth, prediction, name) of each picture.

    Returns:
        wandb objects by logged name.
    """
    import wandb

    labels = {**dict(enumerate(names)), IGNORE_INDEX: "ignored"}
    scores = {set_name: matrix.compute() for set_name, matrix in matrices.items()}
    media = {}
    for set_name, score in scores.items():
        picture = confusion_picture(score["matrix"].numpy(), names)
        media[f"val/{set_name}/confusion_matrix"] = wandb.Image(picture)
    for set_name, samples in drawn.items():
        panels = []
        for image, truth, prediction, name in samples:
            masks = {
                "prediction": {"mask_data": prediction, "class_labels": labels},
                "truth": {"mask_data": truth, "class_labels": labels},
            }
            panels.append(wandb.Image(image, masks=masks, caption=name))
        if panels:
            media[f"val/{set_name}/pictures"] = panels
    rows = [
        [name, *(float(score["IoU"][i]) for score in scores.values())] for i, name in enumerate(scored_names)
    ]
    media["val/IoU_table"] = wandb.Table(columns=["class", *scores], data=rows)
    return media
