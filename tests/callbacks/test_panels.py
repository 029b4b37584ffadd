"""Every n-th step leaves a picture of what the module offered; without an offer there is an error."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.panels import Panels, draw
from lightning_modules.supervised import Supervised
from tests.tiny_training import SIZE, TinyDataModule, TinyNetwork, tiny_module, tiny_trainer


class Offering(Supervised):
    """Offers two rows of pictures, of different widths, in the steps that ask for them."""

    pictures = None

    def training_step(self, batch, batch_idx):
        if self.pictures is not None:
            ids, confidence = torch.full((SIZE, SIZE), 5), torch.ones(SIZE, SIZE)
            self.pictures["source"] = {"image": torch.full((3, SIZE, SIZE), 0.2), "label": ids}
            self.pictures["target"] = {"confidence": confidence}
        return super().training_step(batch, batch_idx)


def train(tmp_path, module, steps, **arguments):
    options = {"enable_checkpointing": False, **arguments}
    tiny_trainer(tmp_path, steps, [Panels(2)], **options).fit(module, TinyDataModule())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_every_second_step_is_drawn(tmp_path, accumulated):
    module = Offering(TinyNetwork(), "deliver11")
    train(tmp_path, module, 4, accumulate_grad_batches=accumulated)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["train-000001.png", "train-000003.png"]
    assert module.pictures is None  # nothing is kept in memory
    colors = {tuple(c) for c in np.asarray(Image.open(tmp_path / "pictures" / names[0])).reshape(-1, 3)}
    road, darkest = module.classes.colors[5], (8, 48, 107)
    assert {(51, 51, 51), road, darkest, (255, 255, 255)} <= colors


def test_a_picture_appears_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(number):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.warns(UserWarning, match="A picture could not be written: disk full. The run goes on"):
        train(tmp_path, Offering(TinyNetwork(), "deliver11"), 1)
    assert not list((tmp_path / "pictures").iterdir())


@pytest.mark.parametrize("every", [0, -1])
def test_an_interval_below_one_is_refused(every):
    with pytest.raises(ValueError, match=rf"found every_n_steps = {every}\. Set it"):
        Panels(every)


def test_ids_are_coloured_and_maps_run_from_white_to_blue():
    colors = ((1, 2, 3), (4, 5, 6))
    assert draw(torch.tensor([[0, 1, 255]]), colors).tolist() == [[[1, 2, 3], [4, 5, 6], [255, 255, 255]]]
    assert draw(torch.tensor([[0.0, 1.0]]), colors).tolist() == [[[255, 255, 255], [8, 48, 107]]]
    assert draw(torch.ones(3, 1, 1), colors).tolist() == [[[255, 255, 255]]]


def test_wandb_gets_the_picture_too(tmp_path):
    from lightning.pytorch.loggers import WandbLogger

    class Recorder(WandbLogger):
        name = version = save_dir = None

        def __init__(self):
            self.logged = []

        def log_metrics(self, metrics, step=None):
            self.logged += [(step, name) for name in metrics if name == "train/pictures"]

        def log_hyperparams(self, *args):
            pass

        log_graph = finalize = log_hyperparams

        def save(self):
            pass

    recorder = Recorder()
    train(tmp_path, Offering(TinyNetwork(), "deliver11"), 3, logger=recorder)
    assert recorder.logged == [(0, "train/pictures"), (2, "train/pictures")]


def test_a_module_without_pictures_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"found Supervised without it\. Leave Panels out"):
        train(tmp_path, tiny_module(), 1)
