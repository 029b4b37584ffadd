"""Modules with the structure and names of the authors' code: their file becomes a run that computes alike."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cli import build, resolve
from config_files import UsageError, short_errors
from models.diffusion.conditioning import add_time_residual
from models.diffusion.features import record_features
from models.diffusion.stable_diffusion import StableDiffusion
from predict import load
from scripts.convert_madm import fill, main, read_checkpoint
from tests import fake_data
from tests.tiny_model import write_tiny_model

CONF = Path(__file__).parents[2] / "conf"
SPEC = importlib.util.spec_from_file_location("test_script", CONF.parent / "test.py")
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

TINY = """
--model.network.diffusion.attention sdpa --model.network.diffusion.vae_dtype float32
--model.network.noise_size [8,8]
--model.network.projection_channels 32 --model.network.bottleneck_channels 32
--model.network.embed_channels 8 --model.network.channels 8
--data.target.eval_size [32,32] --data.num_workers 0
"""
EXTRACTOR = "backbone.feature_extractor."
LDM = f"{EXTRACTOR}ldm_extractor."
UNET = f"{LDM}unet."


class NormConv(nn.Conv2d):
    """detectron2's convolution with a norm inside."""

    def __init__(self, inner: int, outer: int, kernel: int):
        super().__init__(inner, outer, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(32, outer)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Bottleneck(nn.Module):
    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.shortcut = nn.Identity() if inner == outer else NormConv(inner, outer, 1)
        self.conv1, self.conv2 = NormConv(inner, 32, 1), NormConv(32, 32, 3)
        self.conv3 = NormConv(32, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv3(self.conv2(self.conv1(x).relu()).relu()) + self.shortcut(x)).relu()


class ConvModule(nn.Module):
    """mmcv's."""

    def __init__(self, inner: int, outer: int, kernel: int = 1, dilation: int = 1, groups: int = 1):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(inner, outer, kernel, 1, padding, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(outer)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class Separable(nn.Module):
    """mmcv's DepthwiseSeparableConvModule."""

    def __init__(self, inner: int, outer: int, dilation: int):
        super().__init__()
        self.depthwise_conv = ConvModule(inner, inner, 3, dilation, groups=inner)
        self.pointwise_conv = ConvModule(inner, outer)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


class Head(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.embed_layers = nn.ModuleDict({str(i): nn.Module() for i in range(4)})
        for layer in self.embed_layers.values():
            layer.proj = nn.Linear(32, 8)
        self.fuse_layer = nn.Module()
        branches = [ConvModule(32, 8), *(Separable(32, 8, dilation) for dilation in (6, 12, 18))]
        self.fuse_layer.aspp_modules = nn.ModuleList(branches)
        self.fuse_layer.bottleneck = ConvModule(32, 8, 3)
        self.conv_seg = nn.Conv2d(8, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        maps = []
        for i, feature in enumerate(features):
            embedded = self.embed_layers[str(i)].proj(feature.movedim(1, -1)).movedim(-1, 1)
            maps.append(F.interpolate(embedded, features[0].shape[-2:], mode="bilinear"))
        stacked = torch.cat(maps, 1)
        branches = [branch(stacked) for branch in self.fuse_layer.aspp_modules]
        return self.conv_seg(self.fuse_layer.bottleneck(torch.cat(branches, 1)))


class Prompt(nn.Module):
    def __init__(self):
        super().__init__()
        self.prompt_embed, self.alpha_cond_prompt, self.alpha_uncond_prompt = (
            nn.Parameter(torch.randn(1, 16, 32)) for _ in range(3)
        )
        self.alpha_cond_time = nn.Parameter(torch.randn(128))
        self.time_embed = nn.Parameter(torch.randn(1, 1, 128))


class Reference(nn.Module):
    """All that the authors' model saves, with random weights; the base model's are those of a folder."""

    def __init__(self, folder: Path, num_classes: int = 11):
        super().__init__()
        parts = ("unet", "vae_encoder", "vae_decoder", "text_encoder")
        base = StableDiffusion(str(folder), parts=parts)
        self.__dict__["base"] = base  # its helpers are used below, but it is no module of the model
        ldm = nn.Module()
        ldm.unet, ldm.vae, ldm.text_encoder = base.unet, base.vae, base.text_encoder
        ldm.register_buffer("shared_noise", torch.randn(1, 4, 8, 8))
        ldm.register_buffer("uncond_inputs", base.encode_text([""]))
        extractor, self.backbone = nn.Module(), nn.Module()
        self.backbone.feature_extractor, extractor.ldm_extractor = extractor, ldm
        extractor.clip_project_rgb = extractor.clip_project_others = Prompt()
        extractor.ema_clip_project_others = Prompt()
        self.sem_seg_head = self.sem_seg_head_sec_modal = Head(num_classes)
        self.ema_sem_seg_head = Head(num_classes)
        for name in ("feature_projections", "ema_feature_projections"):
            stages = nn.ModuleList(nn.Sequential(Bottleneck(width, 32)) for width in (3, 32, 64, 64))
            setattr(self.backbone, name, stages)
        self.requires_grad_(False).eval()
        frozen = (LDM + "vae.", LDM + "text_encoder.", UNET + "conv_norm_out.", UNET + "conv_out.")
        for name, tensor in self.state_dict().items():
            if name.startswith(UNET) or name.endswith((".norm.weight", "bn.weight", "bias", "running_mean")):
                tensor.add_(0.0 if name.startswith(frozen) else 0.05 * torch.randn_like(tensor))
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)

    def forward(self, image: Tensor, teacher: bool = False) -> Tensor:
        extractor, ema = self.backbone.feature_extractor, "ema_" if teacher else ""
        ldm, taps = extractor.ldm_extractor, (11, 8, 5)
        prompt = getattr(extractor, f"{ema}clip_project_others")
        context = (
            prompt.alpha_uncond_prompt.tanh() * ldm.uncond_inputs
            + prompt.alpha_cond_prompt.tanh() * prompt.prompt_embed
        )
        residual = (prompt.alpha_cond_time.tanh() * prompt.time_embed)[:, 0]
        noised = self.base.add_noise(self.base.encode(image), ldm.shared_noise, 0)
        with add_time_residual(ldm.unet, residual), record_features(ldm.unet, taps) as found:
            output = ldm.unet(noised, 0, context.expand(len(image), -1, -1)).sample
        features = [ldm.vae.decode(output / 0.18215).sample, *(found[tap] for tap in taps)]
        projections = getattr(self.backbone, f"{ema}feature_projections")
        features = [project(x) for project, x in zip(projections, features, strict=True)]
        head = getattr(self, f"{ema}sem_seg_head")
        return head.train(teacher)(features)  # the teacher's norms use their batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    write_tiny_model(folder / "model")
    fake_data.write_cityscapes(folder / "cityscapes")
    fake_data.write_deliver(folder / "deliver")
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    torch.manual_seed(0)
    return Reference(folder / "model")


@pytest.fixture
def weights(reference):
    return {name: tensor.clone() for name, tensor in reference.state_dict().items()}


@pytest.fixture(scope="module")
def module(folder):
    """What the config builds, tiny."""
    overlay = folder / "tiny.yaml"
    options = {"projection_channels": 32, "bottleneck_channels": 32, "embed_channels": 8, "channels": 8}
    diffusion = {"init_args": {"path": str(folder / "model"), "attention": "sdpa", "vae_dtype": None}}
    network = {"init_args": {**options, "noise_size": [8, 8], "diffusion": diffusion}}
    overlay.write_text(json.dumps({"model": {"init_args": {"network": network}}}))
    return build({"model": resolve([CONF / "madm_rgb2depth.yaml", overlay])["model"]})[0]


def test_a_converted_run_computes_what_the_reference_does_and_is_scored(
    folder, reference, weights, tmp_path, capsys, monkeypatch
):
    file, run = tmp_path / "their.pth", tmp_path / "run"
    torch.save({"model": weights, "iteration": 9999, "trainer": {"lr": np.float64(5e-6)}}, file)
    places = {
        "--output": run,
        "--model.network.diffusion.path": folder / "model",
        "--data.source.root": folder / "cityscapes",
        "--data.target.root": folder / "deliver",
    }
    words = [str(word) for item in places.items() for word in item]
    command = [str(file), "--config", str(CONF / "madm_rgb2depth.yaml"), *words, *TINY.split()]
    with pytest.raises(UsageError, match=r"multiarray\.scalar"):
        main(command)
    main([*command, "--allow-pickle"])
    with pytest.raises(UsageError, match="holds a run"):
        main([*command, "--allow-pickle"])

    predictor, image = load(run, "cpu"), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = predictor.model.network
    with torch.no_grad():
        for ours, teacher in ((network(image), False), (network.teacher(image, 0).logits, True)):
            theirs = reference(image, teacher)
            assert theirs.std() > 0.05
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        ids = predictor.predict(image[0])
        assert torch.equal(torch.from_numpy(ids).long(), reference(image).argmax(1)[0])
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert not any(".vae." in key or "unet.conv_out." in key for key in saved["state_dict"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    saved["config"] = saved["config"].replace("attention: sdpa", "attention: xformers")
    torch.save(saved, run / "checkpoints/last.ckpt")  # as trained on a GPU
    script.main([str(run), "--pictures", "0"])
    scores = json.loads((run / "test/own-last/metrics.json").read_text())["test"]
    assert scores["step"] == 10000 and len(scores["sets"]["deliver"]["IoU"]) == 11
    assert "| traffic sign |" in capsys.readouterr().out


class Harmful:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_its_code_only_where_that_is_allowed(tmp_path, capsys):
    file, mark = tmp_path / "their.pth", tmp_path / "ran"
    torch.save({"model": {"a": torch.ones(1)}, "trainer": Harmful(mark)}, file)
    with pytest.raises(SystemExit), short_errors():
        read_checkpoint(file, allow_pickle=False)
    told = capsys.readouterr().err
    assert "mkdir" in told and "any code" in told and "--allow-pickle" in told and not mark.exists()
    assert read_checkpoint(file, allow_pickle=True) == ({"a": torch.ones(1)}, 0) and mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, 'no tensors by name under "model": found state_dict'),
        ({"model": {"a": 1}}, "no tensors by name"),
        (b"no checkpoint", "cannot be read"),
        (None, "cannot be read: FileNotFoundError"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(content, message, tmp_path):
    file = tmp_path / "their.pth"
    if isinstance(content, dict):
        torch.save(content, file)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_checkpoint(file, allow_pickle=True)


def broken(change: str, weights: dict) -> None:
    """Spoil weights in one way."""
    if change == "lacks":
        del weights["ema_sem_seg_head.conv_seg.bias"], weights[f"{UNET}conv_in.weight"]
    elif change == "more":
        weights["sem_seg_head.extra"] = weights["category_head.weight"] = torch.zeros(1)
    elif change == "own U-Net":
        weights[f"{LDM}ema_unet.conv_in.bias"] = torch.zeros(32)
    elif change == "classes":
        weights["sem_seg_head.conv_seg.weight"] = torch.zeros(9, 8, 1, 1)
        del weights["sem_seg_head_sec_modal.conv_seg.weight"]
    elif change == "two prompts":
        weights[f"{EXTRACTOR}clip_project_others.prompt_embed"] += 1
    elif change == "other base":
        weights[f"{UNET}conv_out.bias"] += 1


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ("lacks", ["missing: diffusion.unet.conv_in.weight, ema_adapter.head.classifier.bias"]),
        ("more", ["unexpected: category_head.weight, sem_seg_head.extra"]),
        ("own U-Net", [f"unexpected: {LDM}ema_unet.conv_in.bias"]),
        ("classes", ["mismatched: sem_seg_head.conv_seg.weight", "file [9, 8, 1, 1], model [11, 8, 1, 1]"]),
        ("two prompts", ["unequal duplicates", "clip_project_rgb.prompt_embed and", "clip_project_others."]),
        ("other base", ["not as in the base model", f"{UNET}conv_out.bias"]),
    ],
)
def test_what_does_not_fit_is_named(change, messages, weights, module):
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    broken(change, weights)
    with pytest.raises(ValueError, match="does not fit") as error:
        fill(module, weights)
    assert all(message in str(error.value) for message in messages)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_safetensors_are_read_also_where_duplicates_were_dropped(weights, module, tmp_path):
    dropped = (f"{EXTRACTOR}clip_project_rgb.", "sem_seg_head_sec_modal.")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(dropped)}
    save_file(kept, tmp_path / "their.safetensors")
    read, step = read_checkpoint(tmp_path / "their.safetensors", allow_pickle=False)
    nn.init.zeros_(module.network.adapter.conditioning.prompt)
    fill(module, read)
    prompt = weights[f"{EXTRACTOR}clip_project_rgb.prompt_embed"]
    assert torch.equal(module.network.adapter.conditioning.prompt, prompt) and step == 0


def test_only_what_the_base_model_brings_and_the_teacher_never_reads_is_left_out(weights, module):
    fill(module, weights)
    for part in (".vae.", ".text_encoder.", "running_mean"):
        prefix = "ema_sem_seg_head" if part == "running_mean" else EXTRACTOR
        unused = {name for name in weights if part in name and name.startswith(prefix)}
        assert unused
        fill(module, {name: tensor for name, tensor in weights.items() if name not in unused})


def test_the_unets_names_are_still_those_of_diffusers_0_25(weights):
    block = "attentions.0.transformer_blocks.0"
    names = [
        *("conv_in.weight", "time_embedding.linear_1.weight", "time_embedding.linear_2.bias"),
        *("down_blocks.0.attentions.1.norm.weight", "down_blocks.0.attentions.1.proj_in.weight"),
        *(f"up_blocks.1.{block}.attn1.to_{x}.weight" for x in "qkv"),
        *(f"up_blocks.1.{block}.attn2.to_out.0.{x}" for x in ("weight", "bias")),
        *(f"mid_block.{block}.norm{i}.weight" for i in (1, 2, 3)),
        *(f"mid_block.{block}.ff.net.0.proj.weight", f"mid_block.{block}.ff.net.2.weight"),
        *("up_blocks.0.resnets.2.time_emb_proj.weight", "up_blocks.0.resnets.2.conv_shortcut.weight"),
        *("down_blocks.0.downsamplers.0.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
        *("conv_norm_out.weight", "conv_out.bias"),
    ]
    assert [name for name in names if f"{UNET}{name}" not in weights] == []
