import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from benchmarks import diffsegmenter, plain_diffsegmenter
from benchmarks.diffsegmenter import (
    LiveMemory,
    add_text_encoder,
    completed_by,
    explicit_mib,
    finest_layers,
    load,
    main,
    measure,
    measure_sd15,
    our_maps,
    peak_mib,
)
from benchmarks.plain_diffsegmenter import plain_maps
from benchmarks.random_models import random_model
from functional.classes import MINI_OBJECTS
from models.diffsegmenter import DiffSegmenter
from models.diffusion.stable_diffusion import StableDiffusion
from tests.tiny_model import write_tiny_model
from tests.tiny_run import write_config

CONF = Path(__file__).parent.parent.parent / "conf" / "mini" / "diffsegmenter_objects.yaml"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The mini experiment on a tiny model that knows the words."""
    folder = tmp_path_factory.mktemp("diffsegmenter")
    words = ("a", "an", "photo", "of", *MINI_OBJECTS.names)
    model = write_tiny_model(
        folder / "model", widths=(8, 16, 16, 16), vae_widths=(8, 8), heads=1, words=words
    )
    experiment = yaml.safe_load(CONF.read_text())
    network = experiment["model"]["init_args"]["network"]["init_args"]
    network["diffusion"]["init_args"]["path"] = str(model)
    return write_config(folder / "tiny.yaml", experiment)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Images of 64x64 pixels: latents of 32x32, the smallest of which all levels differ."""
    assert diffsegmenter.SIZE == 256
    monkeypatch.setattr(diffsegmenter, "SIZE", 64)


@pytest.fixture
def scene(config):
    """Arguments of score_maps for three classes, the network first."""
    network, image, name, words = load(config)
    return network, image, name, words[:3]


def test_both_orders_are_compared_weighed_and_timed(config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "new" / "result.json"
    main(["--config", str(config), "--classes", "1", "2", "--pairs", "2", "--output", str(output)])
    result = json.loads(output.read_text())
    found = result["cpu"]
    assert result["config"] == str(config) and {"commit", "processor", "torch", "threads"} <= result.keys()
    assert result["pairs"] == 2 and "no CUDA device" in result["cuda, Stable Diffusion 1.5"]
    assert found["image"] == [3, 64, 64] and found["max_rows"] == 8
    for classes in (1, 2):
        part = found[f"classes_{classes}"]
        assert 0 < part["map_difference"] < 1e-4  # 0 would say that one order was compared with itself
        assert min(part["ours_s"], part["plain_s"], part["times_faster"]) > 0
        assert len(part["times_faster_quartiles"]) == 2
        memory, layers = part["memory_mib"], part["finest_layers"]
        assert part["times_less_memory"] == memory["plain"] / memory["ours"] > 1
        assert layers["all"] == 5 and layers["all_mib"] == memory["ours"]
        assert layers["explicit_growth_mib"] == classes * 4 * 4  # 1024 x 1024 float32 of four further layers
        assert 0 <= layers["growth_mib"] == memory["ours"] - layers["one_mib"]
        assert layers["growth_mib"] < layers["explicit_growth_mib"] / 10


@pytest.mark.parametrize(
    ("factor", "tolerance", "told"), [(1.01, 1e-3, "1.0e-02"), (math.nan, math.inf, "nan")]
)
def test_score_maps_that_differ_are_an_error(scene, monkeypatch, factor, tolerance, told):
    monkeypatch.setattr(diffsegmenter, "plain_maps", lambda *args: factor * plain_maps(*args))
    with pytest.raises(RuntimeError, match=rf"score maps of 3 classes: found a difference of {told}"):
        measure(*scene, pairs=2, tolerance=tolerance)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--pairs", "1"], "--pairs 1: quartiles need at least 2"),
        (["--classes", "5", "27"], "--classes 5 27: .* has 26 classes; ask for 1 to all"),
        (["--classes", "0"], "--classes 0: .* has 26 classes"),
    ],
)
def test_too_few_pairs_and_too_many_classes_are_refused(config, words, told, capsys):
    with pytest.raises(SystemExit):
        main(["--config", str(config), *words])
    assert re.search(told, capsys.readouterr().err)


def test_twenty_classes_are_the_most_by_default(config, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diffsegmenter, "measure_counts", lambda *args, **options: asked.update(options))
    main(["--config", str(config)])
    assert asked == {"counts": (1, 5, 20), "pairs": 10, "tolerance": 1e-3}


# --- the two orders


def test_the_plain_order_calls_the_whole_unet_with_two_rows_for_each_class(scene, monkeypatch):
    diffusion, calls = scene[0].diffusion, []
    encode, encode_text = diffusion.encode, diffusion.encode_text
    monkeypatch.setattr(diffusion, "encode", lambda *args: calls.append("vae") or encode(*args))
    monkeypatch.setattr(diffusion, "encode_text", lambda texts: calls.append(texts[0]) or encode_text(texts))
    diffusion.text_encoder.register_forward_hook(lambda module, args, output: calls.append("text"))
    hooks = {"conv_in": diffusion.unet.conv_in, "conv_out": diffusion.unet.conv_out}
    for name, module in hooks.items():
        module.register_forward_hook(
            lambda module, args, output, name=name: calls.append((name, len(output)))
        )
    plain_maps(*scene)
    assert calls == ["vae", *3 * ["", "text", ("conv_in", 2), ("conv_out", 2)]]


def test_the_plain_order_keeps_the_probabilities_of_all_layers_for_both_rows(scene, monkeypatch):
    seen = {}
    mean = plain_diffsegmenter.mean_attention
    monkeypatch.setattr(
        plain_diffsegmenter, "mean_attention", lambda kept, *args: seen.update(kept) or mean(kept, *args)
    )
    original = scene[0].diffusion.unet.attn_processors
    plain_maps(*scene)
    assert seen.keys() == original.keys() and len(seen) == 32
    for weights in seen.values():
        assert len(weights) == 2
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    assert scene[0].diffusion.unet.attn_processors == original


def test_our_order_encodes_the_texts_of_each_image_again(scene, monkeypatch):
    texts = []
    scene[0].diffusion.text_encoder.register_forward_hook(
        lambda module, args, output: texts.append(len(output.last_hidden_state))
    )
    for _ in range(2):
        our_maps(*scene)
    assert texts == [1, 3, 1, 3]  # the empty prompt, then all classes in one call


def test_fewer_of_the_finest_layers_give_other_maps_and_only_inside_the_block(scene):
    network = scene[0]
    before = our_maps(*scene)
    assert [name.split(".")[:2] for name in finest_layers(network.diffusion.unet)] == [
        *2 * [["down_blocks", "0"]],
        *3 * [["up_blocks", "3"]],
    ]
    with completed_by(1):
        assert (our_maps(*scene) - before).abs().max() > 1e-3
    with completed_by(5):
        assert torch.equal(our_maps(*scene), before)
    assert torch.equal(our_maps(*scene), before)


# --- memory


def test_a_storage_counts_from_the_operation_that_makes_it_until_it_is_freed():
    layer, image = nn.Linear(100, 100, bias=False), torch.randn(10, 100)
    with torch.no_grad(), LiveMemory(layer) as memory:
        found = layer(image)
        assert memory.held == 4000  # neither the weight, of which there was a view, nor a view of the result
        part = found[:5].exp()
        assert memory.held == 6000
        found.relu_()
        assert memory.held == 6000
        del found
        assert memory.held == 2000
        del part
        assert memory.held == 0
    assert memory.peak == 6000


def test_our_order_builds_no_map_of_the_finest_self_attention(scene):
    network, image, name, words = scene
    peak, _ = peak_mib(network, lambda: our_maps(network, image, name, words[:1]))
    assert peak < explicit_mib(network, finest_layers(network.diffusion.unet)[:1], 1) == 4
    peak, _ = peak_mib(network, lambda: plain_maps(network, image, name, words[:1]))
    assert peak > 2 * 5 * 4  # of five layers and both rows


def test_explicit_maps_are_those_of_the_rows_of_one_call(scene):
    network, layers = scene[0], finest_layers(scene[0].diffusion.unet)
    assert explicit_mib(network, layers, 20) == 8 * explicit_mib(network, layers, 1) == 8 * 5 * 4


# --- on the sizes of Stable Diffusion 1.5


def test_the_part_for_cuda_measures_large_images_in_fp16(scene, monkeypatch):
    measured = {}

    def measure_counts(network, image, name, words, counts, **options):
        measured.update(network=network, image=image, name=name, words=words, counts=counts, **options)
        return {}

    def model(version, device, dtype):
        assert device == "cuda"
        return random_model(version, "meta", dtype=dtype)

    monkeypatch.setattr(diffsegmenter, "measure_counts", measure_counts)
    monkeypatch.setattr(diffsegmenter, "random_model", model)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    network, _, name, words = scene
    assert measure_sd15(network, name, words, [1, 3], 5) == {"machine": "a device"}
    large = measured["network"]
    assert measured["image"].shape == (3, 512, 512) and measured["image"].device.type == "meta"
    assert large.prompt is network.prompt and large.level_weights == (0.1, 0.1, 0.5, 0.3)
    assert large.diffusion.text_encoder.dtype == large.diffusion.unet.dtype == torch.float16
    assert large.diffusion.text_encoder.config.hidden_size == large.diffusion.context_width
    assert explicit_mib(large, finest_layers(large.diffusion.unet), 1) == 5 * 256
    assert (measured["name"], measured["words"], measured["counts"]) == (name, words, [1, 3])
    assert measured["pairs"] == 5 and measured["tolerance"] == math.inf


def test_a_model_that_was_given_a_text_encoder_is_measured_in_half_precision(scene, monkeypatch):
    other, image, name, words = scene
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    monkeypatch.setattr(diffsegmenter, "TEXT_ENCODER", {**sizes, "max_position_embeddings": 16})
    diffusion = StableDiffusion(other.diffusion.path, parts=("unet", "vae_encoder"), dtype="bfloat16")
    torch.manual_seed(0)
    add_text_encoder(diffusion, other.diffusion.tokenizer)
    found = measure(DiffSegmenter(diffusion, size=(64, 64)), image, name, words[:1], 2, math.inf)
    assert 0 < found["map_difference"] <= 1 and found["times_less_memory"] > 1


@pytest.mark.cuda
def test_an_image_on_the_device_is_timed_and_weighed(scene):
    network, _, name, words = scene
    found = measure_sd15(network, name, words, [1], 2)["classes_1"]
    assert found["times_faster"] > 0 and found["times_less_memory"] > 1
    assert found["finest_layers"]["growth_mib"] < found["finest_layers"]["explicit_growth_mib"] / 10
