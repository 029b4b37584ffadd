import copy
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import madm
from benchmarks.madm import TFLOP, main, measure, measure_config, measure_sd14
from benchmarks.plain_madm import plain_backward
from benchmarks.random_models import random_model
from cli import build, resolve
from models.madm import MADM
from tests.tiny_model import write_tiny_model
from tests.tiny_run import write_config

CONF = Path(__file__).parent.parent.parent / "conf" / "mini" / "madm_rgb2depth.yaml"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The mini experiment on a tiny model and two pairs of crops of 32x32."""
    folder = tmp_path_factory.mktemp("madm")
    model = write_tiny_model(folder / "model", widths=(8, 16, 16, 16), vae_widths=(8, 8), heads=1)
    experiment = yaml.safe_load(CONF.read_text())
    network = experiment["model"]["init_args"]["network"]["init_args"]
    network["diffusion"]["init_args"]["path"] = str(model)
    experiment["data"]["init_args"]["batch_size"] = 2
    for domain in ("source", "target"):
        transform = experiment["data"]["init_args"][domain]["init_args"]["transform"]
        transform["init_args"]["crop_size"] = [32, 32]
    return write_config(folder / "tiny.yaml", experiment)


@pytest.fixture(scope="module")
def resolved(config):
    return resolve([config])


@pytest.fixture
def module_and_batch(resolved):
    experiment = copy.deepcopy(resolved)
    experiment["data"]["init_args"] |= {"rare_class_sampling": None, "num_workers": 0}
    module, datamodule = build(experiment)
    return module, next(iter(datamodule.train_dataloader()))


def test_the_plain_order_encodes_one_kind_of_image_at_a_time(module_and_batch, monkeypatch):
    (module, batch), seen = module_and_batch, []
    encode = module.network.diffusion.encode
    monkeypatch.setattr(
        module.network.diffusion, "encode", lambda image: seen.append(len(image)) or encode(image)
    )
    plain_backward(module, batch)
    assert seen == [2] * 5


def test_our_step_needs_half_the_memory_and_gives_the_same_gradients(config, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(madm, "build", lambda config: built.extend(build(config)) or built)
    output = tmp_path / "new" / "result.json"
    main(["--config", str(config), "--pairs", "2", "--warmup", "1", "--output", str(output)])
    result = json.loads(output.read_text())
    found = result["cpu"]
    assert result["config"] == str(config) and {"commit", "processor", "torch", "threads"} <= result.keys()
    assert found["images"] == [2, 3, 32, 32] and found["pairs"] == 2
    assert found["gradient_difference"] < 1e-4
    assert 0.45 < found["memory_ours_over_plain"] <= 0.65
    assert min(found["ours_s"], found["plain_s"], *found["ours_over_plain_quartiles"]) > 0
    steps = {int(state["step"]) for state in built[0].trainer.optimizers[0].state.values()}
    assert steps == {2 * 3}  # both orders update the weights
    assert 0 < built[0].trainer.callback_metrics["train/quality"] < 1  # some pseudo labels count
    assert "no CUDA device" in result["cuda, Stable Diffusion 1.4"]


def test_gradients_that_differ_are_an_error(resolved, monkeypatch):
    def other(module, batch):
        plain_backward(module, batch)
        module.network.adapter.head.fuse[0].weight.grad *= 1.01

    monkeypatch.setattr(madm, "plain_backward", other)
    monkeypatch.setattr(madm, "resolve", lambda paths: copy.deepcopy(resolved))
    with pytest.raises(RuntimeError, match=r"found a difference of 9\.9e-03, allowed is 1e-03"):
        measure_config(CONF, 2, 1)


@pytest.mark.slow
def test_under_autocast_both_orders_run_too(module_and_batch):
    result = measure(*module_and_batch, 2, 1, accelerator="cpu", precision="bf16-mixed")
    assert 0.45 < result["memory_ours_over_plain"] <= 0.65
    assert result["gradient_difference"] < 0.3  # of biases whose gradients are small; none is lost


def test_too_few_pairs_for_quartiles_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--pairs", "1"])
    assert "at least 2 pairs" in capsys.readouterr().err


# --- on the sizes of Stable Diffusion 1.4


def test_the_operations_of_the_roofline_are_those_of_the_network(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know meta tensors
    network = MADM(random_model("sd-1.4", "meta"), 11).to("meta")
    image, latent = (torch.empty(1, *shape, device="meta") for shape in ((3, 512, 512), (4, 64, 64)))
    sizes = ((3, 512), (320, 64), (640, 32), (1280, 16))
    features = [torch.empty(1, width, size, size, device="meta") for width, size in sizes]
    context = torch.empty(1, 77, 768, device="meta")
    calls = {
        "unet": lambda: network.diffusion.predict(latent, 0, context),
        "adapter": lambda: network.adapter(features),
        "encode": lambda: network.encode(image),
        "decode": lambda: network.decode_latent(latent),
    }
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() / 1e12 == pytest.approx(TFLOP[name], abs=6e-4), name


def test_the_part_for_cuda_measures_one_pair_of_large_images_in_bf16(monkeypatch):
    measured = {}

    def measure(module, batch, pairs, warmup, **trainer):
        shapes = [batch["source"][key].shape for key in ("image", "label")] + [batch["target"]["image"].shape]
        measured.update(trainer, pairs=pairs, warmup=warmup, shapes=[tuple(shape) for shape in shapes])
        return {"ours_s": 0.1}

    monkeypatch.setattr(madm, "measure", measure)
    monkeypatch.setattr(madm, "random_model", lambda version, device: random_model(version, "meta"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    result = measure_sd14(5, 2)
    assert measured["accelerator"] == "gpu" and measured["precision"] == "bf16-mixed"
    assert measured["shapes"] == [(1, 3, 512, 512), (1, 512, 512), (1, 3, 512, 512)]
    assert measured["pairs"] == 5 and measured["warmup"] == 2 and result["machine"] == "a device"
    # 32.14 TFLOP at 790 TFLOP/s and 40 bytes for each of 865.8 million parameters at 4.8 TB/s, of 0.1 s
    assert result["percent_of_h200_roofline"] == pytest.approx(40.7 + 7.2, abs=0.1)


@pytest.mark.cuda
def test_a_step_on_the_device_is_timed_and_weighed():
    result = measure_sd14(2, 1)
    assert 0 < result["memory_ours_over_plain"] < 1 and 0 < result["percent_of_h200_roofline"] < 100
