"""MADM on the sizes of Stable Diffusion 1.4: its configs and tensors without memory."""

from contextlib import nullcontext

import pytest
import torch

from benchmarks.random_models import random_model
from lightning_modules.base import parameter_groups
from models.madm import MADM


def build(num_classes, **options):
    return MADM(random_model("sd-1.4", "meta"), num_classes, **options).to("meta")


def count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(("num_classes", "total"), [(11, 865_808_715), (9, 865_808_201)])
def test_the_trained_parameters_are_the_published_ones(num_classes, total):
    network = build(num_classes)
    unet = network.diffusion.unet
    assert count(network) == total
    assert count(unet) == 859_508_800
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert count(network.adapter.conditioning) == 179_968
    projections = [count(projection) for projection in network.adapter.projections]
    assert projections == [165_632, 420_352, 625_152, 1_034_752]
    assert count(network.adapter.head) == {11: 3_874_059, 9: 3_873_545}[num_classes]
    assert {name: tuple(p.shape) for name, p in network.adapter.conditioning.named_parameters()} == {
        "prompt": (1, 77, 768),
        "prompt_gate": (1, 77, 768),
        "text_gate": (1, 77, 768),
        "time": (1, 1280),
        "time_gate": (1280,),
    }
    groups = parameter_groups(network, 5e-6, 0.05, {}, decay_norm_and_bias=False)
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.05]
    assert sum(p.numel() for group in groups for p in group["params"]) == total


def test_trained_output_layers_and_an_own_unet_of_the_teacher_add_what_they_weigh():
    assert count(build(11, train_output_layers=True)) == 865_808_715 + 12_164
    network = build(11, ema_unet=True)
    assert count(network) == 865_808_715
    assert sum(p.numel() for p in network.ema_unet.parameters()) == 859_520_964


@pytest.mark.parametrize("size", [(512, 512), (256, 512)])
def test_features_have_the_published_shapes(monkeypatch, size):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know meta tensors
    network, shapes, raw = build(11), {}, {}
    for name, projection in zip(("s0", "s3", "s4", "s5"), network.adapter.projections, strict=True):
        projection.register_forward_hook(
            lambda _, given, out, name=name: (
                shapes.update({name: tuple(out.shape)}) or raw.update({name: given[0].shape[1]})
            )
        )
    output = network.student(torch.empty(1, 3, *size, device="meta"))
    height, width = size
    assert shapes == {
        "s0": (1, 128, height, width),
        "s3": (1, 512, height // 8, width // 8),
        "s4": (1, 512, height // 16, width // 16),
        "s5": (1, 512, height // 32, width // 32),
    }
    assert raw == {"s0": 3, "s3": 320, "s4": 640, "s5": 1280}
    assert output.logits.shape == (1, 11, height, width)
    assert output.latent.shape == (1, 4, height // 8, width // 8)


def test_without_lplr_the_finest_feature_is_that_of_stride_4(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    network = build(11, lplr=False)
    assert network.encoder_layer is network.diffusion.vae.encoder.down_blocks[2].resnets[0]
    assert count(network.adapter.projections[0]) == 280_064
    image = torch.empty(1, 3, 512, 512, device="meta")
    assert network.encode_with_feature(image, None)[1].shape == (1, 512, 128, 128)
    assert network(image).shape == (1, 11, 512, 512)
