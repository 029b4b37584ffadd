"""What a training step saw, drawn at an interval: images, labels and maps side by side."""

from pathlib import Path

import numpy as np
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from callbacks.pictures import Colors, legend, side_by_side, to_uint8, write_picture
from callbacks.run_record import a_failure_is_a_warning
from functional.palette import colorize, heat


def draw(picture: Tensor, colors: Colors) -> np.ndarray:
    """Draw an image [3, H, W] in [0, 1], class ids [H, W] (integers) or a map [H, W] in [0, 1] (floats)."""
    if picture.ndim == 3:
        return to_uint8(picture)
    values = picture.cpu().numpy()
    return heat(values) if picture.is_floating_point() else colorize(values.astype(np.uint8), colors)


def stack(rows: list[np.ndarray]) -> np.ndarray:
    """Put pictures uint8 [h, w, 3] below each other, with white to the right of the narrower ones."""
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate(padded)


class Panels(Callback):
    """Draws every n-th step into <run>/pictures/train-<step>.png, and to wandb where the run logs to it.

    Before such a step the LightningModule's attribute `pictures`, None otherwise, becomes a dict, which the
    module fills: row -> title -> picture of one sample, see `draw`. It also asks for `classes`.

    Args:
        every_n_steps: the first step is drawn, then every n-th one.

    Raises:
        ValueError: every_n_steps is below 1; the LightningModule has no attribute `pictures`.
    """

    def __init__(self, every_n_steps: int = 500):
        if every_n_steps < 1:
            raise ValueError(
                f"Panels draw every n-th step, n being 1 or more: found every_n_steps = {every_n_steps}. "
                "Set it higher, or leave Panels out of trainer.callbacks."
            )
        self.every_n_steps = every_n_steps

    def setup(self, trainer, pl_module, stage: str) -> None:
        if not hasattr(pl_module, "pictures"):
            raise ValueError(
                "Panels need a model that offers pictures of its steps in an attribute `pictures`: found "
                f"{type(pl_module).__name__} without it. Leave Panels out of trainer.callbacks."
            )

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        self.step = trainer.global_step
        due = trainer.is_global_zero and self.step % self.every_n_steps == 0
        pl_module.pictures = {} if due else None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if not pl_module.pictures:
            return
        table = pl_module.classes
        rows = [
            side_by_side(
                {f"{row} {title}": draw(picture, table.colors) for title, picture in pictures.items()}, 256
            )
            for row, pictures in pl_module.pictures.items()
        ]
        width = max(row.shape[1] for row in rows)
        panel = stack([*rows, legend(table.names, table.colors, width, ignored=True)])
        pl_module.pictures = None
        name = f"train-{self.step + 1:06d}.png"  # the number of steps done, as in metrics.csv
        with a_failure_is_a_warning("A picture"):
            write_picture(panel, Path(trainer.default_root_dir) / "pictures" / name)
        for logger in (logger for logger in trainer.loggers if isinstance(logger, WandbLogger)):
            logger.log_image("train/pictures", [panel], step=self.step)
