"""Each validation leaves pictures of the same images; wandb gets masks, an IoU table, confusion matrices."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.loggers import WandbRun
from callbacks.predictions import Predictions
from tests.tiny_training import TinyDataModule, tiny_module, tiny_trainer


def run(tmp_path, per_set, **arguments):
    callback = Predictions(per_set)
    options = {"limit_val_batches": 1.0, "val_check_interval": 1, "enable_checkpointing": False}
    trainer = tiny_trainer(tmp_path, 2, [callback], **options, **arguments)
    trainer.fit(tiny_module(), TinyDataModule())
    return sorted(path.name for path in (tmp_path / "pictures").glob("*"))


@pytest.mark.parametrize("per_set", [0, 1, 3])
def test_the_first_images_of_each_set_are_drawn(tmp_path, per_set):
    day = [f"val-day-tiny-1-{i}.png" for i in range(min(per_set, 3))]
    night = [f"val-night-tiny-2-{i}.png" for i in range(min(per_set, 2))]
    assert run(tmp_path, per_set) == day + night


def test_pictures_that_cannot_be_written_are_a_warning(tmp_path, monkeypatch):
    def fail(number):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.warns(UserWarning, match="A picture could not be written: disk full. The run goes on"):
        assert run(tmp_path, 1) == []


def test_a_picture_shows_image_truth_and_prediction(tmp_path):
    run(tmp_path, 1)
    picture = np.asarray(Image.open(tmp_path / "pictures/val-day-tiny-1-0.png"))
    colors = {tuple(color) for color in picture.reshape(-1, 3)}
    data = TinyDataModule().eval_datasets("val")["day"][0]
    assert tuple(data["image"][5, 5]) in colors
    table = tiny_module().classes
    assert {table.colors[i] for i in np.unique(data["label"]) if i != 255} <= colors


def test_an_image_of_another_size_than_its_label_is_kept_in_the_labels_size(tmp_path):
    callback, data = Predictions(1), TinyDataModule()
    trainer = tiny_trainer(tmp_path, 1, [callback], enable_checkpointing=False, limit_val_batches=1)
    loader = data.val_dataloader()[0]
    small = [{**batch, "image": batch["image"][..., ::2, ::2]} for batch in loader]
    module = tiny_module()
    module.matrices, module.trainer = {"day": None}, trainer
    outputs = next(iter(loader))["label"]
    callback.on_validation_batch_end(trainer, module, outputs, small[0], 0)
    ((image, truth, prediction, _),) = callback.drawn["day"]
    assert small[0]["image"].shape[-2:] == (8, 8)
    assert image.shape == (16, 16, 3) and truth.shape == prediction.shape == (16, 16)


def test_a_sanity_check_draws_nothing(tmp_path):
    options = {"limit_val_batches": 1.0, "num_sanity_val_steps": 1, "val_check_interval": 100}
    trainer = tiny_trainer(tmp_path, 1, [Predictions(1)], enable_checkpointing=False, **options)
    trainer.fit(tiny_module(), TinyDataModule())
    assert not (tmp_path / "pictures").exists()


def test_wandb_gets_masks_with_class_names_the_table_and_confusion_matrices(tmp_path):
    class Recorder(WandbRun):
        def __init__(self):
            self.logged, self.summary = [], {}

        def show(self, facts):
            pass

        def summarize(self, values):
            self.summary |= values

        def log_metrics(self, metrics, step=None):
            self.logged.append((step, metrics))

        def log_hyperparams(self, *args):
            pass

        def log_graph(self, *args):
            pass

        def save(self):
            pass

        def finalize(self, status):
            pass

        name = version = save_dir = None

    recorder = Recorder()
    run(tmp_path, 1, logger=recorder)
    media = [(step, metrics) for step, metrics in recorder.logged if "val/IoU_table" in metrics]
    assert [step for step, _ in media] == [0, 1]
    assert {0, 1} == {step for step, metrics in recorder.logged if "val/mIoU" in metrics}
    last = media[-1][1]
    assert last["val/IoU_table"].columns == ["class", "day", "night"]
    assert last["val/IoU_table"].data[0][0] == "sky" and len(last["val/IoU_table"].data) == 11
    assert {"val/day/confusion_matrix", "val/night/confusion_matrix"} <= set(last)
    picture = last["val/day/pictures"][0]
    assert set(picture._masks) == {"prediction", "truth"}
    assert picture._caption == "tiny-1-0"
    assert recorder.summary["last/step"] == 2 and {"best/mIoU", "last/day/mIoU"} <= set(recorder.summary)


@pytest.mark.parametrize(
    ("monitor", "mode", "best"),
    [
        ("val/mIoU", "max", 2),
        ("val/mIoU", "min", 3),
        ("val/day/mIoU", "max", 3),
        ("val/nothing", "max", None),
    ],
)
def test_the_best_validation_is_that_of_the_monitored_score_and_survives_a_resume(monitor, mode, best):
    rows = {1: (float("nan"), 1.0), 2: (5.0, 2.0), 3: (3.0, 9.0), 4: (5.0, 9.0)}
    callback, watching = Predictions(0), SimpleNamespace(monitor=monitor, mode=mode)
    for step, (mean, day) in rows.items():
        scores = {"val/mIoU": torch.tensor(mean), "val/day/mIoU": torch.tensor(day)}
        trainer = SimpleNamespace(
            global_step=step, callback_metrics=scores, checkpoint_callbacks=[object(), watching]
        )
        last = callback.keep_best(trainer)
        state, callback = callback.state_dict(), Predictions(0)
        callback.load_state_dict(state)
        assert last["step"] == step and last["day/mIoU"] == day
    assert callback.best.get("step") == best
