"""A tiny MADM on blocks whose colour tells their class: what the tests of its training share."""

from functools import partial

import numpy as np
import torch
from lightning.pytorch import Callback
from torch.utils.data import Dataset, default_collate

from lightning_modules.madm import MADMTraining
from models.diffusion.stable_diffusion import StableDiffusion
from models.madm import MADM
from tests.tiny_training import TinyDataModule, tiny_trainer

SIZE = 32
FROZEN = ("diffusion.vae.", "diffusion.unet.conv_norm_out.", "diffusion.unet.conv_out.")


class Blocks(Dataset):
    """Images of coloured blocks whose colour tells the class, 32x32."""

    def __init__(self, length, offset):
        self.length, self.offset = length, offset

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng([self.offset, index])
        label = rng.integers(0, 11, (4, 4), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        noise = rng.integers(0, 30, (SIZE, SIZE, 3))
        image = (label[..., None] * [20, 9, 15] + noise).astype(np.uint8)
        label[:3] = 255
        return {"image": image, "label": label, "name": f"blocks-{self.offset}-{index}"}


def pair(samples, width=SIZE):
    """Every other sample as source, the rest as target, without their labels, as wide as is said."""
    samples = [{k: v if k == "name" else v[..., :width] for k, v in sample.items()} for sample in samples]
    target = default_collate(samples[1::2])
    return {"source": default_collate(samples[::2]), "target": {k: target[k] for k in ("image", "name")}}


class Pairs(TinyDataModule):
    """Stands for AdaptationDataModule: `pairs` source and target images of random blocks a batch."""

    def __init__(self, pairs=1, width=SIZE, num_workers=0):
        super().__init__(batch_size=2 * pairs, num_workers=num_workers)
        self.transform, self.width = None, width

    def train_dataset(self):
        return Blocks(14, 0)

    def eval_datasets(self, split):
        return {"day": Blocks(3, 1), "night": Blocks(2, 2)}

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.collate_fn = partial(pair, width=self.width)
        return loader


def tiny_madm(folder, network=None, num_classes=11, **arguments):
    """The same training module at each call, on the model in `folder`; options of the network as a dict."""
    torch.manual_seed(0)
    options = {"dropout": 0.0, **(network or {})}
    parts = ("unet", "vae_encoder", "vae_decoder", "text_encoder")
    widths = {"projection_channels": 32, "bottleneck_channels": 32, "embed_channels": 8, "channels": 8}
    model = MADM(StableDiffusion(str(folder), parts), num_classes, noise_size=(16, 16), **widths, **options)
    return MADMTraining(model, "deliver11", **{"lr": 1e-3, "threshold": 0.16, **arguments})


class Watch(Callback):
    """Records at each step k, the gradients before clipping, learning rates, and what was logged."""

    def __init__(self):
        self.steps, self.gradients, self.rates, self.logged = [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append(trainer.global_step)
        self.rates.append({group["lr"] for group in optimizer.param_groups})
        named = pl_module.network.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def fit(module, tmp_path, steps=1, callbacks=(), data=None, resume=None, **options):
    watch = Watch()
    trainer = tiny_trainer(
        tmp_path, steps, [watch, *callbacks], enable_checkpointing=bool(callbacks), **options
    )
    trainer.fit(module, data or Pairs(), ckpt_path=resume, weights_only=True if resume else None)
    return watch


def first_batch(pairs=1, width=SIZE):
    return next(iter(Pairs(pairs, width).train_dataloader()))


def spy(module, monkeypatch, name):
    calls, original = [], getattr(module.network, name)

    def call(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(module.network, name, call)
    return calls
