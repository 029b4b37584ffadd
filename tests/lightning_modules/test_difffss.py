"""Few-shot training and scoring on coloured shapes: what is logged, what supports change, sizes, resuming."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything

from callbacks.checkpoints import Checkpoints
from datamodules.auxiliary import Auxiliary, Supports
from functional.sliding_window import segment_image
from lightning_modules.difffss import DifFSS, episodes
from lightning_modules.schedules import WarmupPoly
from models.few_shot.bam import BAM
from models.few_shot.hsnet import HSNet
from models.few_shot.pfenet import PFENet
from models.few_shot.pspnet import PSPNet
from models.few_shot.resnet import ResNet
from tests.fake_few_shot import FakeImages, fake_few_shot, jittered
from tests.tiny_training import StopAt, assert_equal, tiny_trainer, training_state

PLANES = (4, 4, 8, 8)


def backbone(dilated: bool) -> ResNet:
    return ResNet((1, 1, 1, 1), PLANES, deep_stem=True, dilated=dilated)


def host(kind: str) -> torch.nn.Module:
    seed_everything(0, verbose=False)
    if kind == "hsnet":
        return HSNet(backbone(dilated=False), (4, 8, 8))
    if kind == "pfenet":
        return PFENet(backbone(dilated=True), channels=8)
    return BAM(PSPNet(backbone(dilated=True), num_classes=7, channels=8), channels=8)


class Shapes(FakeImages):
    """Images of FakeImages whose classes have colours of their own."""

    def read(self, index):
        image, label = super().read(index)
        colors = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
        return (image // 4 + colors[label] // 4 * 3).astype(np.uint8), label


class AsBrightAsTheSupports(torch.nn.Module):
    """Says that all pixels are the object that are brighter than the supports are in the mean."""

    def predict(self, episodes, resize):
        limit = episodes.supports.mean((1, 2, 3, 4))[:, None, None]
        return (episodes.query.mean(1) > limit).long()


def data(**options):
    made = fake_few_shot(**{"size": 32, "batch_size": 4, "eval_batch_size": 4, **options})
    made.fake_images = Shapes()
    return made


def few_shot_trainer(max_steps: int = 1, **options):
    return tiny_trainer(
        None,
        max_steps,
        limit_val_batches=None,
        val_check_interval=max_steps,
        enable_checkpointing=False,
        **options,
    )


def fitted(kind: str, datamodule, max_steps: int = 2, lr: float = 1e-3, **options):
    module = DifFSS(host(kind), optimizer="adam", lr=lr, weight_decay=0.0)
    trainer = few_shot_trainer(max_steps, **options)
    trainer.fit(module, datamodule=datamodule)
    return module, trainer


@pytest.mark.parametrize("kind", ["hsnet", "bam", "pfenet"])
def test_a_host_learns_on_coloured_shapes_and_its_scores_are_finite(kind):
    losses = []

    class Keep(StopAt):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    _, trainer = fitted(kind, data(supports=jittered(2)), max_steps=15, lr=5e-3, callbacks=[Keep(0)])
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])
    logged = trainer.callback_metrics
    assert all(torch.isfinite(value) for value in logged.values())
    assert {
        "val/mIoU",
        "val/FB-IoU",
        "val/1-shot/mIoU",
        "val/1-shot/FB-IoU",
        "val/1-shot/IoU/thing 1",
    } <= set(logged)


@pytest.mark.parametrize("kind", ["hsnet", "bam", "pfenet"])
def test_the_frozen_backbone_and_its_statistics_stay_as_they_were(kind):
    before = {k: v.clone() for k, v in host(kind).state_dict().items()}
    module, _ = fitted(kind, data())
    frozen = [k for k in before if k.startswith(("backbone.", "base_learner."))]
    assert frozen and all(torch.equal(before[k], module.network.state_dict()[k]) for k in frozen)
    assert any(not torch.equal(before[k], v) for k, v in module.network.state_dict().items())


def test_no_auxiliary_images_is_the_plain_baseline_bit_for_bit():
    settings = [None, jittered(0), Supports(1, Auxiliary(source="jitter", use_in="none"))]
    runs = [fitted("pfenet", data(supports=supports))[0] for supports in settings]
    weights = [run.network.state_dict() for run in runs]
    assert all(torch.equal(weights[0][k], other[k]) for other in weights[1:] for k in weights[0])


def test_auxiliary_images_in_training_change_a_host_that_looks_at_all_supports():
    plain, helped = (fitted("pfenet", data(supports=s))[0].network for s in (None, jittered(2)))
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), helped.parameters(), strict=True))


def test_all_settings_of_supports_are_scored_on_the_same_episodes_and_copies_of_a_support_change_nothing():
    settings = {
        "1-shot": Supports(1),
        "copies": Supports(1, Auxiliary(source="duplicate", num=2)),
        "3-shot": Supports(3),
    }
    datamodule = data(eval_supports=settings)
    module = DifFSS(AsBrightAsTheSupports())
    few_shot_trainer().test(module, datamodule=datamodule, verbose=False)
    lines = module.details()["episodes.csv"].splitlines()
    rows = {name: [line.split(",")[1:] for line in lines if line.startswith(name + ",")] for name in settings}
    assert rows["1-shot"] == rows["copies"] != rows["3-shot"] and len(rows["1-shot"]) == 12
    assert [row[:2] for row in rows["1-shot"]] == [row[:2] for row in rows["3-shot"]]
    assert lines[0].split(",")[1:3] == ["episode", "class"]


def test_the_weight_of_supports_reaches_the_host():
    batch = next(iter(data(eval_supports={"a": jittered(2, weight=0.25)}).test_dataloader()[0]))
    assert episodes(batch).weights.tolist() == [[1.0, 0.25, 0.25]] * 4


@pytest.mark.parametrize("exact", [False, True])
def test_a_prediction_is_scored_at_the_size_of_the_querys_file(exact):
    datamodule = data(original_size=True, exact_unpad=exact, eval_batch_size=1)
    module = DifFSS(host("pfenet")).eval()
    found = []
    for batch in datamodule.test_dataloader()[0]:
        mask = module.predict_step(batch, 0)
        assert mask.shape == batch["label"].shape
        found.append((tuple(mask.shape[1:]), batch["image"].shape[-1]))
    assert {side for _, side in found} == {32}
    assert ({size[0] for size, _ in found} == {24, 28, 32}) == exact  # else squares of the longer side


def test_cutting_the_padding_off_changes_what_is_scored():
    module = DifFSS(host("pfenet")).eval()

    class Corner(torch.nn.Module):
        def predict(self, episodes, resize):
            logits = torch.zeros(1, 2, 32, 32)
            logits[:, 1, 16:] = 1.0
            return resize(logits).argmax(1)

    module.network = Corner()
    batch = {"image": torch.zeros(1, 3, 32, 32), "label": torch.zeros(1, 48, 64).long()}
    batch |= {"support_image": None, "support_label": None, "support_weight": None}
    whole = module.predict_step(batch, 0).float().mean()
    cut = module.predict_step(batch | {"valid_size": torch.tensor([[24, 32]])}, 0).float().mean()
    assert whole > 0.45 and cut < 0.4


def test_images_without_supports_and_windows_are_refused():
    module = DifFSS(host("hsnet"))
    with pytest.raises(ValueError, match="images without supports"):
        module.predict_step({"image": torch.zeros(1, 3, 32, 32), "name": ["x"]}, 0)
    module.protocol = partial(segment_image, flip=True)
    with pytest.raises(ValueError, match="windows, scales or flips"):
        module.predict_step(next(iter(data().test_dataloader()[0])), 0)


class Keep(StopAt):
    """Notes what is logged."""

    def __init__(self, step=0):
        super().__init__(step)
        self.logged = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["hsnet", "bam", "pfenet"])
def test_a_resumed_training_equals_an_unbroken_one_without_workers_bit_for_bit(tmp_path, kind, workers):
    """F01."""
    logged = []
    whole, parts = (tmp_path / name / "checkpoints/last.ckpt" for name in ("whole", "parts"))
    for path, stop, resume in ((whole, 0, None), (parts, 2, None), (parts, 0, parts)):
        module = DifFSS(host(kind), optimizer="adam", lr=1e-3, schedule=WarmupPoly(warmup_steps=3))
        keep = Keep(stop)
        trainer = tiny_trainer(path.parent.parent, 4, [keep, Checkpoints(every_n_steps=2)])
        supports = jittered(2, dropout_p=0.5)
        datamodule = data(supports=supports, num_workers=workers if path == parts else 0)
        torch.manual_seed(7 if resume is None else 8)  # another process starts with other generators
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
        logged.append(keep.logged)
    assert len(logged[1]) == len(logged[2]) == 2 and logged[1] + logged[2] == logged[0]
    assert "train/loss" in logged[0][0]
    assert_equal(training_state(whole), training_state(parts))


def test_the_optimiser_is_the_one_that_was_chosen():
    for name, kind in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        module = DifFSS(host("hsnet"), optimizer=name)
        few_shot_trainer().fit(module, datamodule=data())
        assert type(module.optimizers().optimizer) is kind
    with pytest.raises(KeyError):
        DifFSS(host("hsnet"), optimizer="lion").configure_optimizers()
