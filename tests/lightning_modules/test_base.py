"""Parameter groups, schedules per step, scores per set, and what a checkpoint holds, lacks and refuses."""

import copy
import pickle
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from callbacks.checkpoints import Checkpoints
from callbacks.run_record import metrics_table, nest_metrics
from functional.classes import class_table
from functional.sliding_window import segment_image
from lightning_modules.base import parameter_groups
from lightning_modules.metrics import ConfusionMatrix
from lightning_modules.schedules import WarmupPoly
from lightning_modules.supervised import Supervised
from tests.tiny_training import TinyDataModule, TinyNetwork, tiny_module, tiny_trainer


def names_by_group(module, **arguments):
    defaults = {"lr": 1.0, "weight_decay": 0.05, "lr_multipliers": {}, "decay_norm_and_bias": True}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, **{**defaults, **arguments})
    return [({names[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in groups]


def test_without_options_all_trainable_parameters_form_one_group():
    expected = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert names_by_group(TinyNetwork()) == [(expected, 1.0, 0.05)]


def test_norms_and_biases_can_be_exempt_from_decay_in_exactly_two_groups():
    groups = names_by_group(TinyNetwork(), decay_norm_and_bias=False)
    assert sorted(groups, key=lambda group: group[2]) == [
        ({"norm.weight", "norm.bias", "head.bias"}, 1.0, 0.0),
        ({"head.weight"}, 1.0, 0.05),
    ]


def test_learning_rates_are_multiplied_by_part_of_the_name():
    groups = names_by_group(TinyNetwork(), lr_multipliers={"head": 10, "head.bias": 2})
    assert [(names, lr) for names, lr, _ in groups] == [
        ({"norm.weight", "norm.bias"}, 1.0),
        ({"head.weight"}, 10.0),
        ({"head.bias"}, 20.0),
    ]


def test_shared_parameters_are_trained_once():
    layer = nn.Linear(2, 2)
    assert len(names_by_group(nn.Sequential(layer, layer))[0][0]) == 2


def test_a_multiplier_that_matches_nothing_trainable_is_an_error():
    with pytest.raises(ValueError, match=r"4 trainable parameters.*\['features'\]"):
        names_by_group(TinyNetwork(), lr_multipliers={"features": 10})


def test_a_network_without_trainable_parameters_is_an_error():
    with pytest.raises(ValueError, match="found 0 trainable parameters"):
        names_by_group(nn.Identity())


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("warmup_steps", [2, 6])
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("validate", [False, True])
def test_the_schedule_follows_optimiser_steps(tmp_path, accumulated, warmup_steps, validate):
    """F32: also with validations in between, and where training ends before its warm-up does."""
    schedule, rates = WarmupPoly(warmup_steps=warmup_steps, warmup_start=0.1), Rates()
    module = tiny_module(schedule=schedule, lr=0.5, lr_multipliers={"head": 10})
    options = {"limit_val_batches": 1.0, "val_check_interval": accumulated} if validate else {}
    options |= {"enable_checkpointing": False, "accumulate_grad_batches": accumulated}
    trainer = tiny_trainer(tmp_path, 4, [rates], **options)
    trainer.fit(module, TinyDataModule())
    expected = [0.5 * schedule(step, 4) for step in range(4)]
    assert rates.seen == [pytest.approx([rate, 10 * rate]) for rate in expected]


def test_a_schedule_without_a_length_is_an_error(tmp_path):
    trainer = tiny_trainer(tmp_path, -1, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"trainer\.max_steps = -1"):
        trainer.fit(tiny_module(schedule=WarmupPoly()), TinyDataModule())


@pytest.mark.parametrize("stage", ["val", "test"])
def test_each_set_is_scored_on_its_own_and_the_mean_is_over_sets(tmp_path, stage):
    module, data = tiny_module().eval(), TinyDataModule()
    trainer = tiny_trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=1.0)
    {"val": trainer.validate, "test": trainer.test}[stage](module, data, verbose=False)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}

    per_set = {}
    for set_name, dataset in data.eval_datasets(stage).items():
        hits, union, valid, correct = torch.zeros(11), torch.zeros(11), 0, 0
        for i in range(len(dataset)):
            image = torch.from_numpy(dataset[i]["image"]).permute(2, 0, 1)[None] / 255
            label = torch.from_numpy(dataset[i]["label"]).long()
            predicted = module.network(image).argmax(1)[0]
            seen = label != 255
            valid, correct = valid + seen.sum(), correct + (seen & (predicted == label)).sum()
            for c in range(11):
                hits[c] += ((predicted == c) & (label == c)).sum()
                union[c] += (((predicted == c) | (label == c)) & seen).sum()
        per_set[set_name] = (100 * hits / union).nanmean().item()
        assert logged[f"{stage}/{set_name}/mIoU"] == pytest.approx(per_set[set_name], abs=1e-4)
        assert logged[f"{stage}/{set_name}/IoU/road"] == pytest.approx(
            (100 * hits[5] / union[5]).item(), abs=1e-4
        )
        assert logged[f"{stage}/{set_name}/aAcc"] == pytest.approx((100 * correct / valid).item(), abs=1e-4)
        weighted = module.matrices[set_name].compute()["fwIoU"].item()
        assert logged[f"{stage}/{set_name}/fwIoU"] == pytest.approx(weighted, abs=1e-4)
    assert logged[f"{stage}/mIoU"] == pytest.approx(sum(per_set.values()) / 2, abs=1e-4)


def test_scores_of_a_second_validation_do_not_contain_the_first(tmp_path):
    module, data = tiny_module(), TinyDataModule()
    trainer = tiny_trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=1.0)
    first = trainer.validate(module, data, verbose=False)
    assert first[0] == pytest.approx(trainer.validate(module, data, verbose=False)[0], nan_ok=True)
    assert module.matrices["day"].matrix.sum() == 3 * 14 * 16


def test_two_processes_score_the_same_as_one(tmp_path):
    module, data, scores = tiny_module(), TinyDataModule(), []
    for options in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        trainer = tiny_trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=1.0, **options)
        trainer.validate(module, data, verbose=False)
        scores.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    assert len(scores[0]) == 31
    assert scores[0] == pytest.approx(scores[1], nan_ok=True)


class KeepDetails(Callback):
    """Writes what a test leaves beside its scores, because what a forked process knows ends with it."""

    def __init__(self, folder):
        self.folder = folder

    def on_test_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            (self.folder / f"{trainer.world_size}.csv").write_text(pl_module.details()["images.csv"])


def test_each_image_of_a_test_has_its_score_in_one_process_and_in_two(tmp_path):
    module, data = tiny_module().eval(), TinyDataModule()
    for options in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        trainer = tiny_trainer(
            tmp_path, 1, [KeepDetails(tmp_path)], enable_checkpointing=False, limit_val_batches=1.0, **options
        )
        trainer.test(module, data, verbose=False)
    lines = ["set,name,mIoU"]
    for set_name, dataset in data.eval_datasets("test").items():
        for sample in (dataset[i] for i in range(len(dataset))):
            matrix = ConfusionMatrix(11)
            image = torch.from_numpy(sample["image"]).permute(2, 0, 1)[None] / 255
            matrix.update(module.network(image).argmax(1), torch.from_numpy(sample["label"]).long()[None])
            lines.append(f"{set_name},{sample['name']},{matrix.compute()['mIoU']:.3f}")
    assert (tmp_path / "1.csv").read_text().splitlines() == lines and len(lines) == 6
    assert (tmp_path / "2.csv").read_text() == (tmp_path / "1.csv").read_text()


@pytest.mark.parametrize("use", ["fit", "validate", "predict"])
def test_a_network_of_other_classes_than_the_table_is_refused_at_the_first_batch(tmp_path, use):
    network = TinyNetwork()
    network.head = nn.Conv2d(8, 12, 1)
    module, trainer = Supervised(network, "deliver11"), tiny_trainer(tmp_path, 1, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"12 classes, the table has 11\. Set model.*num_classes to 11"):
        if use == "predict":
            module.predict_step({"image": torch.rand(1, 3, 16, 16)}, 0)
        else:
            trainer.limit_val_batches = 1
            getattr(trainer, use)(module, TinyDataModule())


def test_a_module_that_checks_its_network_can_still_be_copied_and_pickled():
    module = pickle.loads(pickle.dumps(copy.deepcopy(tiny_module())))
    assert module(torch.rand(1, 3, 16, 16)).shape == (1, 11, 16, 16)


def test_prediction_gives_the_class_of_every_pixel():
    module = tiny_module().eval()
    image = torch.rand(2, 3, 16, 16)
    assert torch.equal(module.predict_step({"image": image}, 0), module.network(image).argmax(1))


class Named(Supervised):
    """Keeps the sizes and names of what it segments."""

    def segment(self, image, names=None):
        self.asked = [*getattr(self, "asked", []), (tuple(image.shape), names)]
        return super().segment(image, names)


def test_the_protocol_decides_how_images_are_segmented_and_their_names_reach_every_part():
    module, names = Named(TinyNetwork(), "deliver11").eval(), ["a", "b"]
    image = torch.rand(2, 3, 16, 16)
    assert torch.equal(module.logits({"image": image}), module.network(image))
    module.protocol = partial(segment_image, window=(8, 16), window_stride=(8, 16), scales=[1.5], flip=True)
    module.asked = []
    found = module.logits({"image": image, "name": names})
    assert torch.equal(found, module.protocol(module.network, image))
    assert module.asked == [((2, 3, 8, 16), names)] * 2 * 3 * 2


@pytest.mark.parametrize("options", [{"window": (8, 8)}, {"scales": [0.5]}, {"flip": True}])
def test_what_is_scored_and_predicted_follows_the_protocol(tmp_path, options):
    module, data, scores = tiny_module(), TinyDataModule(), []
    image = torch.rand(1, 3, 16, 16)
    plain = module.eval().predict_step({"image": image}, 0)
    for protocol in (module.protocol, partial(segment_image, **options)):
        module.protocol = protocol
        trainer = tiny_trainer(tmp_path, 1, enable_checkpointing=False)
        scores.append(trainer.test(module, data, verbose=False)[0]["test/day/aAcc"])
    assert scores[0] != scores[1]
    assert not torch.equal(module.eval().predict_step({"image": image}, 0), plain)


def trained(folder, **arguments):
    module = tiny_module(**arguments)
    tiny_trainer(folder, 2, [Checkpoints()]).fit(module, TinyDataModule())
    return module, folder / "checkpoints/last.ckpt"


def validate(folder, module, path):
    tiny_trainer(folder, 2, [Checkpoints()], limit_val_batches=1).validate(
        module, TinyDataModule(), path, verbose=False, weights_only=True
    )


def test_a_checkpoint_holds_the_class_table_and_not_the_frozen_weights(tmp_path):
    module, path = trained(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    table = class_table("deliver11")
    assert checkpoint["classes"]["name"] == "deliver11"
    assert tuple(checkpoint["classes"]["names"]) == table.names
    assert tuple(map(tuple, checkpoint["classes"]["colors"])) == table.colors
    assert checkpoint["frozen"]["names"] == ["network.features.bias", "network.features.weight"]
    assert set(checkpoint["frozen"]["sha256"]) == {"network.features"}
    assert set(checkpoint["state_dict"]) == set(module.state_dict()) - set(checkpoint["frozen"]["names"])


def test_a_module_with_the_same_frozen_weights_takes_over_the_trained_ones(tmp_path):
    module, path = trained(tmp_path)
    other = tiny_module()
    with torch.no_grad():
        other.network.head.weight.zero_()
    validate(tmp_path, other, path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_other_frozen_weights_are_an_error_that_names_the_part(tmp_path):
    _, path = trained(tmp_path)
    with pytest.raises(ValueError, match=r"a different SHA-256 for network\.features\."):
        validate(tmp_path, tiny_module(seed=1), path)


def test_another_class_table_is_an_error_that_lists_what_differs(tmp_path):
    _, path = trained(tmp_path)
    with pytest.raises(
        ValueError, match=r"'deliver11' \(11 classes\).*'mini_objects'.*only in the checkpoint: sky"
    ):
        validate(tmp_path, tiny_module(classes="mini_objects"), path)


def test_a_missing_trainable_weight_is_an_error_that_names_it(tmp_path):
    _, path = trained(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["state_dict"]["network.head.bias"]
    torch.save(checkpoint, path)
    with pytest.raises(RuntimeError, match=r"network\.head\.bias"):
        validate(tmp_path, tiny_module(), path)


def test_a_foreign_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="no classes and no frozen"):
        validate(tmp_path, tiny_module(), tmp_path / "x.ckpt")


def nineteen_classes(**arguments):
    network = TinyNetwork()
    network.head = nn.Conv2d(8, 19, 1)
    return Supervised(network, "cityscapes19", **arguments)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_subsets_of_the_classes_are_scored_too_in_each_set_their_mean_and_the_table(tmp_path, stage):
    module, data = nineteen_classes(class_subsets=["synthia16", "synthia13"]).eval(), TinyDataModule()
    trainer = tiny_trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=1.0)
    {"val": trainer.validate, "test": trainer.test}[stage](module, data, verbose=False)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    left_out = {"mIoU": [], "mIoU16": [9, 14, 16], "mIoU13": [3, 4, 5, 9, 14, 16]}
    for key, ids in left_out.items():
        per_set = []
        for name, matrix in module.matrices.items():
            iou = matrix.compute()["IoU"].clone()
            iou[ids] = torch.nan
            per_set.append(iou.nanmean().item())
            assert logged[f"{stage}/{name}/{key}"] == pytest.approx(per_set[-1], abs=1e-4)
        assert logged[f"{stage}/{key}"] == pytest.approx(sum(per_set) / 2, abs=1e-4)
    assert len({logged[f"{stage}/day/{key}"] for key in left_out}) == 3
    table = metrics_table(nest_metrics(logged, stage))
    cells = " | ".join(f"{logged[f'{stage}/{name}mIoU16']:.2f}" for name in ("day/", "night/", ""))
    assert f"| **mIoU16** | {cells} |" in table


def test_without_subsets_nothing_more_is_scored(tmp_path):
    trainer = tiny_trainer(tmp_path, 1, enable_checkpointing=False, limit_val_batches=1.0)
    trainer.validate(nineteen_classes(), TinyDataModule(), verbose=False)
    assert not any("mIoU1" in name for name in trainer.callback_metrics)


def test_a_subset_that_the_class_table_lacks_or_nobody_knows_is_an_error():
    with pytest.raises(
        ValueError, match=r"'deliver11' cannot be scored on 'synthia13': found no class traffic light and"
    ):
        tiny_module(class_subsets=["synthia13"])
    with pytest.raises(ValueError, match="'synthia12': choose one of"):
        nineteen_classes(class_subsets=["synthia12"])
