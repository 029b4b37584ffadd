"""DifFSS's published configs hold the published settings; they take steps on fake data and small networks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cli import resolve
from models.few_shot.pspnet import PSPNet
from models.few_shot.resnet import ResNet
from scripts.generate_support_images import main as generate
from tests import fake_few_shot
from tests.test_test import script as test_script
from train import main as train

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
SGD = {"optimizer": "sgd", "weight_decay": 1e-4}
POLY = {"warmup_steps": 0, "power": 0.9}
THIN = {"planes": [4, 4, 8, 16], "blocks": [1, 1, 1, 1]}
SHORT = """
--trainer.accelerator cpu --trainer.devices 1 --trainer.max_steps 2 --wandb.mode disabled --data.num_workers 0
--data.batch_size 2 --data.min_pixels 1
"""


def settings(*names: str) -> tuple[dict, dict, dict]:
    config = resolve([CONF / f"{name}.yaml" for name in names])
    return config["model"]["init_args"], config["data"]["init_args"], config["trainer"]


def assert_holds(options: dict, expected: dict) -> None:
    assert {key: options[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "classes", "size", "scale", "batch_size"),
    [("difffss_pascal5i", 16, 473, [0.9, 1.1], 24), ("difffss_coco20i", 61, 641, [0.8, 1.25], 8)],
)
def test_bam_with_auxiliary_images_has_the_published_settings(name, classes, size, scale, batch_size):
    model, data, _ = settings(name)
    network = model["network"]["init_args"]
    assert_holds(model, {**SGD, "lr": 0.05})
    assert_holds(model["schedule"]["init_args"], POLY)
    assert_holds(network, {"shot": 5, "channels": 256, "kshot_dim": 2, "dropout": 0.5})
    assert network["base_learner"]["init_args"]["num_classes"] == classes
    assert_holds(
        network["base_learner"]["init_args"]["backbone"]["init_args"], {"deep_stem": True, "dilated": True}
    )
    assert_holds(data, {"protocol": "bam", "size": size, "batch_size": batch_size, "val_seed": 321})
    assert data["test_seeds"] == [510, 365, 382, 322, 988] and data["episodes"] == 1000
    assert data["supports"]["shot"] == 1 and data["supports"]["aux"]["num"] == 4
    assert_holds(
        data["supports"]["aux"], {"use_in": "both", "anchor": "first", "missing": "error", "weight": 1.0}
    )
    augmentation = data["transform"]["init_args"]
    assert_holds(augmentation, {"crop_size": [size, size], "scale": scale, "degrees": 10.0, "keep": 0.85})


@pytest.mark.parametrize(
    ("data_set", "batch_size", "lists"),
    [("pascal5i", 20, ["data/hsnet_trn.txt", "data/hsnet_val.txt"]), ("coco20i", 40, [None, None])],
)
def test_hsnet_as_an_overlay_has_its_own_published_settings(data_set, batch_size, lists):
    model, data, trainer = settings(f"difffss_{data_set}", f"few_shot/hsnet_{data_set}")
    assert_holds(model, {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "schedule": None})
    network = model["network"]["init_args"]
    assert network["squeeze_channels"] == [16, 64, 128]
    assert_holds(network["backbone"]["init_args"], {"deep_stem": False, "dilated": False})
    assert_holds(data, {"protocol": "hsnet", "size": 400, "batch_size": batch_size, "transform": None})
    assert_holds(data, {"episodes": 1000, "val_seed": 0, "test_seeds": [0], "original_size": False})
    assert [data["train_list"], data["test_list"]] == lists and data["min_pixels"] is None
    assert_holds(data["supports"], {"shot": 1})
    assert_holds(data["supports"]["aux"], {"use_in": "test", "num": 4})
    pairs = {"pascal5i": 11394, "coco20i": 6198}[data_set]  # of fold 0, a pass
    assert trainer["max_steps"] == 350 * -(-pairs // batch_size)
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0  # the last weights are scored


@pytest.mark.parametrize(
    ("data_set", "lr", "bins", "size", "batch_size", "passes", "images"),
    [
        ("pascal5i", 0.025, [60, 30, 15, 8], 473, 4, 200, 4208),
        ("coco20i", 0.05, [1.0, 0.5, 0.25, 0.125], 641, 8, 50, 2171),
    ],
)
def test_pfenet_as_an_overlay_has_its_own_published_settings(
    data_set, lr, bins, size, batch_size, passes, images
):
    model, data, trainer = settings(f"difffss_{data_set}", f"few_shot/pfenet_{data_set}")
    assert_holds(model, {**SGD, "lr": lr})
    assert_holds(model["schedule"]["init_args"], POLY)
    network = model["network"]["init_args"]
    assert_holds(network, {"channels": 256, "bins": bins})
    assert_holds(network["backbone"]["init_args"], {"deep_stem": True, "dilated": True})
    assert_holds(data, {"protocol": "bam", "size": size, "batch_size": batch_size, "val_seed": 321})
    assert data["transform"]["init_args"]["crop_size"] == [size, size]
    assert data["supports"]["aux"]["use_in"] == "both"
    assert trainer["max_steps"] == pytest.approx(passes * images / batch_size, rel=0.01)
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0


def test_fss1000_takes_each_query_once():
    model, data, _ = settings("difffss_fss1000")
    assert model["network"]["class_path"] == "models.few_shot.hsnet.HSNet" and model["optimizer"] == "adam"
    assert_holds(data, {"episodes": None, "size": 400, "batch_size": 20, "val_seed": 0, "test_seeds": [0]})
    assert data["eval_supports"]["auxiliary"]["aux"]["control"] == "hed"


def test_fss1000_can_have_pfenet_as_its_host():
    model, data, _ = settings("difffss_fss1000", "few_shot/pfenet_fss1000")
    assert model["network"]["class_path"] == "models.few_shot.pfenet.PFENet"
    assert_holds(model, {**SGD, "lr": 0.025})
    assert_holds(model["schedule"]["init_args"], POLY)
    assert model["network"]["init_args"]["bins"] == [60, 30, 15, 8]
    assert_holds(data, {"protocol": "hsnet", "episodes": None, "size": 473, "batch_size": 4})
    assert data["eval_supports"]["auxiliary"]["aux"]["control"] == "hed"


@pytest.mark.parametrize(("name", "classes"), [("pascal5i", 16), ("coco20i", 61)])
def test_the_base_learner_has_the_published_settings(name, classes):
    model, data, _ = settings(f"base_learner_{name}")
    assert_holds(model, {**SGD, "lr": 2.5e-4, "lr_multipliers": {"ppm": 10, "cls": 10}})
    assert model["network"]["init_args"]["num_classes"] == classes
    assert_holds(data, {"batch_size": 12, "classes": f"{name}_base0"})
    augmentation = data["transform"]["init_args"]
    assert_holds(augmentation, {"crop_size": [417, 417], "scale": [0.5, 2.0], "keep": 0.0})


FEW = ["--data.episodes", "3", "--data.train_length", "40"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder in which the auxiliary images lie that FEW episodes of the mini experiments read."""
    folder = tmp_path_factory.mktemp("drawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for host in ("hsnet", "bam"):  # PFENet's episodes are BAM's
            generate(["--config", str(CONF / f"mini/difffss_{host}.yaml"), *FEW, "--steps", "1"])
    return folder


@pytest.mark.parametrize("host", ["hsnet", "bam", "pfenet"])
def test_a_mini_experiment_trains_resumes_and_is_scored_on_all_settings(host, drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(drawn)
    config, run = str(CONF / f"mini/difffss_{host}.yaml"), tmp_path / "run"
    words = ["--config", config, *FEW, "--data.batch_size", "2", "--wandb.mode", "disabled"]
    words += ["--output", str(run), "--trainer.max_steps"]
    train([*words, "1"])
    train([*words, "2", "--resume"])
    test_script.main([str(run), "--checkpoint", "last", "--pictures", "1"])
    found = json.loads((run / "test/own-last/metrics.json").read_text())["test"]
    settings = resolve([Path(config)])["data"]["init_args"]["eval_supports"]
    assert list(found["sets"]) == list(settings) and len(settings) == 5
    assert {"mIoU", "FB-IoU", "IoU"} == found["sets"]["1-shot"].keys()
    rows = (run / "test/own-last/episodes.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * len(settings)
    cells = [[int(cell) for cell in row.split(",")[4:]] for row in rows[1:]]
    images = (run / "test/own-last/images.csv").read_text().splitlines()[1:]
    scores = [float(line.rsplit(",", 1)[1]) for line in images]
    assert scores == pytest.approx([100 * right / (fp + fn + right) for fp, fn, right in cells], abs=1e-3)
    assert images[0].startswith("1-shot,episode 000000 ")


@pytest.mark.slow
def test_two_processes_score_episodes_to_the_same_numbers_as_one(drawn, tmp_path):
    config, run = str(CONF / "mini/difffss_hsnet.yaml"), tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = ["--config", config, *FEW, "--data.batch_size", "2", "--data.eval_batch_size", "1"]
    words += ["--wandb.mode", "disabled", "--output", str(run), "--trainer.max_steps", "1"]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], cwd=drawn, check=True, env=environment)
    found = []
    for devices in ("1", "2"):
        command = [
            sys.executable,
            str(ROOT / "test.py"),
            str(run),
            "--checkpoint",
            "last",
            "--devices",
            devices,
        ]
        subprocess.run(
            [*command, "--output", str(tmp_path / devices)], cwd=drawn, check=True, env=environment
        )
        names = ("metrics.json", "episodes.csv", "images.csv")
        found.append([(tmp_path / devices / "own-last" / name).read_text() for name in names])
    assert found[0] == found[1]


@pytest.mark.slow
def test_base_learner_and_hosts_of_pascal_take_two_steps_on_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # below which the configs expect their data
    fake_few_shot.write_pascal5i(Path("data"), validation=120)
    save_file(ResNet(**THIN, deep_stem=True).state_dict(), "deep.safetensors")
    save_file(ResNet(**THIN).state_dict(), "plain.safetensors")
    thin = [f"--{{}}.{key} {value}".replace(" [", " [").replace(", ", ",") for key, value in THIN.items()]

    def words(prefix: str) -> list[str]:
        return " ".join(thin).format(*[prefix] * len(thin)).split()

    base = "model.network.backbone"
    train(
        [
            "--config",
            str(CONF / "base_learner_pascal5i.yaml"),
            *words(base),
            f"--{base}.weights",
            "deep.safetensors",
            "--data.few_shot.num_workers",
            "0",
            "--model.network.channels",
            "8",
            "--data.transform.crop_size",
            "[33,33]",
            "--output",
            "runs/base_learner_pascal5i_fold0",
            *" ".join(SHORT.split()).replace("--data.min_pixels 1", "").split(),
        ]
    )
    own = ["--data.root", "data", "--data.size", "33", "--data.episodes", "2", *SHORT.split()]
    config = ["--config", str(CONF / "difffss_pascal5i.yaml")]
    jitter = ["--data.supports.aux.source", "jitter"]
    backbone = "model.network.base_learner.backbone"
    crop = ["--data.transform.crop_size", "[33,33]"]
    train(
        [
            *config,
            *own,
            *jitter,
            *crop,
            *words(backbone),
            "--output",
            "bam",
            "--model.network.channels",
            "8",
            "--model.network.base_learner.channels",
            "8",
            "--model.network.base_learner.weights",
            "runs/base_learner_pascal5i_fold0/checkpoints/last.ckpt",
        ]
    )
    for split, year in (("trn", 2007), ("val", 2008)):  # stands for HSNet's lists of pairs, of all folds
        stems = sorted(path.stem for path in Path("data").rglob(f"JPEGImages/{year}_*.jpg"))
        lines = [f"{stem}__{int(stem[5:]) % 20 + 1:02}" for stem in stems]
        Path(f"data/hsnet_{split}.txt").write_text("\n".join(lines))
    hsnet = [*config, "--config", str(CONF / "few_shot/hsnet_pascal5i.yaml"), *own, *jitter, *words(base)]
    train([*hsnet, "--data.size", "32", f"--{base}.weights", "plain.safetensors", "--output", "hsnet"])
    pfenet = [
        *config,
        "--config",
        str(CONF / "few_shot/pfenet_pascal5i.yaml"),
        *own,
        *jitter,
        *crop,
        *words(base),
    ]
    train(
        [
            *pfenet,
            "--model.network.bins",
            "[1.0,0.5]",
            f"--{base}.weights",
            "deep.safetensors",
            "--output",
            "pfenet",
        ]
    )
    for run in ("bam", "hsnet", "pfenet"):
        checkpoint = torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 2
    learned = torch.load("runs/base_learner_pascal5i_fold0/checkpoints/last.ckpt", weights_only=True)
    assert PSPNet(ResNet(**THIN, deep_stem=True), 16, channels=8).state_dict().keys() == {
        key.removeprefix("network.") for key in learned["state_dict"]
    }
