import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import diff
from benchmarks.diff import TFLOP, main, measure_config, roofline_seconds
from benchmarks.random_models import random_model
from models.diff import CITYSCAPES_PROMPTS, DIFF, DIFFBackbone
from tests.tiny_model import write_tiny_model
from tests.tiny_run import write_config

CONF = Path(__file__).parent.parent.parent / "conf" / "mini" / "diff_game2real.yaml"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The mini experiment on a tiny model, one scene and crops of 32x32."""
    folder = tmp_path_factory.mktemp("diff")
    model = write_tiny_model(folder / "model", widths=(8, 16, 16, 16), vae_widths=(8, 8), heads=1)
    experiment = yaml.safe_load(CONF.read_text())
    backbone = experiment["model"]["init_args"]["network"]["init_args"]["backbone"]["init_args"]
    backbone["diffusion"]["init_args"]["path"] = str(model)
    backbone["prompts"] = {"sidewalk": "road"}
    source = experiment["data"]["init_args"]["source"]["init_args"]
    source["train_length"] = 1
    source["transform"]["init_args"]["crop_size"] = [32, 32]
    experiment["data"]["init_args"]["targets"][0]["init_args"] |= {"size": 64, "eval_length": 4}
    return write_config(folder / "tiny.yaml", experiment)


def test_both_orders_are_timed_and_their_logits_agree(config, tmp_path, monkeypatch):
    assert diff.STEPS == 37
    monkeypatch.setattr(diff, "STEPS", 5)
    main(["--config", str(config), "--pairs", "2", "--output", str(tmp_path / "result.json")])
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["cpu"]["crop"] == [1, 3, 32, 32] and found["cpu"]["scored"] == [3, 64, 64]
    assert set(found["cpu"]["logit_differences"]) == {"fixed noise", "eta 0"}
    assert max(found["cpu"]["logit_differences"].values()) < 1e-3
    for part in ("training", "evaluation", "evaluation of four"):
        timed = found["cpu"][part]
        assert timed["times_faster"] > 0 and len(timed["times_faster_quartiles"]) == 2
    if not torch.cuda.is_available():
        assert found["cuda, Stable Diffusion 2.1"].startswith("left out")


def test_orders_that_do_not_agree_are_not_timed(config, monkeypatch):
    plain = diff.plain_branches
    monkeypatch.setattr(diff, "STEPS", 1)
    monkeypatch.setattr(diff, "plain_branches", lambda *args: [2 * logits for logits in plain(*args)])
    with pytest.raises(RuntimeError, match="do not give the same logits"):
        measure_config(config, 2)


@pytest.mark.parametrize(("kind", "width"), [("train", 512), ("eval", 1024)])
def test_the_operations_of_the_roofline_are_those_of_the_modules(kind, width):
    diffusion = random_model("sd-2.1", "meta", ["", *CITYSCAPES_PROMPTS.values()])
    network = DIFF(DIFFBackbone(diffusion), 19).to("meta").eval()
    latent = torch.empty(1, 4, 64, width // 8, device="meta")
    strides = {1: (69120, 32), 2: (34560, 16), 3: (17280, 8)}
    buffers = [torch.empty(1, c, 512 // s, width // s, device="meta") for c, s in strides.values()]

    def learned():
        pairs = zip(network.backbone.aggregations, buffers, strict=True)
        network.head(network.backbone.finecoder([aggregation(buffer) for aggregation, buffer in pairs]))

    parts = (
        lambda: diffusion.unet(
            latent, torch.zeros(1, device="meta"), torch.empty(1, 77, 1024, device="meta")
        ),
        lambda: diffusion.vae.encode(torch.empty(1, 3, 512, width, device="meta")),
        learned,
    )
    for part, tflop in zip(parts, TFLOP[kind], strict=True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part()
        assert counter.get_total_flops() / 1e12 == pytest.approx(tflop, rel=2e-3)
    passes, rows, fusions = (34, 3, 6) if kind == "train" else (34, 1, 1)
    unet, encode, fusion = TFLOP[kind]
    wanted = (passes * rows * unet + encode + fusions * fusion) / 790
    assert roofline_seconds(network, kind) == pytest.approx(wanted)


@pytest.mark.cuda
def test_a_step_and_an_evaluation_on_the_device_are_timed_and_weighed():
    found = diff.measure_sd21(2)["sdpa"]
    for part in ("training", "evaluation"):
        assert found["memory_bytes"][part] > 0 and 0 < found["percent_of_h200_roofline"][part] < 100
