import pickle
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from models.diffusion import weights as hub
from models.few_shot import weights
from models.few_shot.pspnet import PSPNet
from models.few_shot.resnet import ResNet
from models.few_shot.vgg import VGG16

TINY = {"blocks": (1, 1, 2, 1), "planes": (2, 2, 4, 4)}


def random_state(module, seed=0):
    """A state of other values everywhere than a new module's."""
    generator = torch.Generator().manual_seed(seed)
    state = module.state_dict().items()
    return {k: torch.rand(v.shape, generator=generator).to(v.dtype) for k, v in state}


def assert_loaded(module, state):
    own = module.state_dict()
    assert own.keys() == state.keys()
    assert [key for key in own if not torch.equal(own[key], state[key])] == []


def psp_name(key):
    """conv1, bn1, conv2 .. of a deep stem as PSPNet counts them in layer0."""
    part, rest = key.split(".", 1)
    numbers = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7}
    return f"layer0.{numbers[part]}.{rest}" if part in numbers else key


def timm_name(key):
    """The same stem as timm counts it in conv1; its last BatchNorm is bn1."""
    part, rest = key.split(".", 1)
    names = {"conv1": "conv1.0", "bn1": "conv1.1", "conv2": "conv1.3", "bn2": "conv1.4", "conv3": "conv1.6"}
    return f"{names.get(part, 'bn1' if part == 'bn3' else part)}.{rest}"


def psp_file(state):
    """A published PSPNet: in a DataParallel, its encoder twice, with head and optimiser."""
    named = {psp_name(key): value for key, value in state.items()}
    second = {f"encoder.{key.removeprefix('layer')}": value for key, value in named.items()}
    heads = {key: torch.ones(2) for key in ("ppm.features.0.1.weight", "cls.4.bias", "aux.4.bias")}
    tensors = {f"module.{key}": value for key, value in (named | second | heads).items()}
    return {"epoch": 3, "state_dict": tensors, "optimizer": {"state": {}}}


DEEP = {
    "psp.pth": psp_file,
    "initmodel.pth": lambda state: state | {"fc.weight": torch.ones(3), "fc.bias": torch.ones(3)},
    "timm.pt": lambda state: {timm_name(key): value for key, value in state.items()},
    "ours.ckpt": lambda state: {
        "state_dict": {f"network.backbone.{key}": value for key, value in state.items()}
        | {"network.ppm.0.1.weight": torch.ones(2), "network.cls.4.bias": torch.ones(1)},
        "global_step": 7,
    },
    "encoder.pth": lambda state: {f"encoder.{key}": value for key, value in state.items()},
}


@pytest.mark.parametrize("name", DEEP)
def test_a_deep_stem_backbone_is_read_from_every_layout_that_it_is_published_in(name, tmp_path):
    state = random_state(ResNet(**TINY, deep_stem=True))
    torch.save(DEEP[name](state), tmp_path / name)
    assert_loaded(ResNet(**TINY, deep_stem=True, weights=str(tmp_path / name)), state)


def test_a_plain_stem_is_read_from_torchvisions_file_and_from_pspnets_layer0(tmp_path):
    state = random_state(ResNet(**TINY))
    save_file(state | {"fc.bias": torch.ones(3)}, tmp_path / "plain.safetensors")
    torch.save({psp_name(key): value for key, value in state.items()}, tmp_path / "psp.pth")
    for name in ("plain.safetensors", "psp.pth"):
        assert_loaded(ResNet(**TINY, weights=str(tmp_path / name)), state)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg_is_read_from_torchvisions_and_timms_features_and_from_pspnets_layers(batch_norm, tmp_path):
    network = VGG16(batch_norm, planes=(2, 2, 2, 2))
    state, flat = random_state(network), {}
    starts = (0, 7, 14, 24, 34) if batch_norm else (0, 5, 10, 17, 24)
    for key, value in state.items():
        layer, number, leaf = key.split(".")
        flat[f"features.{starts[int(layer[-1])] + int(number)}.{leaf}"] = value
    others = {
        "classifier.0.bias": torch.ones(1),
        "pre_logits.fc1.bias": torch.ones(1),
        "head.fc.bias": torch.ones(1),
    }
    for stored in (flat | others, psp_file(state)):
        torch.save(stored, tmp_path / "vgg.pth")
        assert_loaded(VGG16(batch_norm, (2, 2, 2, 2), str(tmp_path / "vgg.pth")), state)


def test_missing_unexpected_and_mismatched_tensors_are_an_error_that_names_them(tmp_path):
    state = random_state(ResNet(**TINY))
    del state["layer2.0.bn1.bias"]
    state |= {"stranger.weight": torch.ones(1), "layer3.1.conv1.weight": torch.ones(3, 2)}
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError) as error:
        ResNet(**TINY, weights=str(tmp_path / "odd.safetensors"))
    for words in (
        "not of this ResNet",
        "missing: layer2.0.bn1.bias;",
        "unexpected: stranger.weight;",
        "mismatched: layer3.1.conv1.weight (file [3, 2], model [4, 16, 1, 1]).",
    ):
        assert words in str(error.value)


def test_weights_of_a_deeper_network_are_refused_though_they_hold_all_that_is_asked_for(tmp_path):
    save_file(random_state(ResNet((1, 1, 3, 1), TINY["planes"])), tmp_path / "deeper.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: layer3\.2\.bn1\.bias"):
        ResNet(**TINY, weights=str(tmp_path / "deeper.safetensors"))


def test_a_checkpoint_without_the_frozen_backbone_is_refused(tmp_path):
    torch.save({"state_dict": {"network.backbone.bn1.running_mean": torch.ones(2)}}, tmp_path / "host.ckpt")
    with pytest.raises(ValueError, match=r"missing: .*conv1\.weight"):
        ResNet(**TINY, weights=str(tmp_path / "host.ckpt"))


def test_files_older_than_batch_norms_counter_are_read_and_leave_it(tmp_path):
    state = random_state(ResNet(**TINY))
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "old.pth")
    network = ResNet(**TINY, weights=str(tmp_path / "old.pth"))
    torch.testing.assert_close(network.bn1.running_mean, state["bn1.running_mean"])
    assert network.bn1.num_batches_tracked == 0


def test_two_different_tensors_of_one_name_are_an_error(tmp_path):
    state = random_state(ResNet(**TINY))
    torch.save(state | {"backbone.bn1.bias": state["bn1.bias"] + 1}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"a second, different tensor as backbone\.bn1\.bias"):
        ResNet(**TINY, weights=str(tmp_path / "two.pth"))


class Harm:
    def __reduce__(self):
        return (pytest.fail, ("code of the file ran",))


@pytest.mark.parametrize(
    "content",
    [pickle.dumps({"conv1.weight": Harm()}, protocol=2), b"", b"damaged"],
    ids=["code", "empty", "bytes"],
)
def test_a_file_that_brings_code_or_is_damaged_is_refused_without_running_it(content, tmp_path):
    for name in ("bad.pth", "bad.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.*cannot be read.*\.safetensors"):
            ResNet(**TINY, weights=str(tmp_path / name))


def test_a_file_without_named_tensors_is_refused(tmp_path):
    for stored in ([1, 2], {"epoch": 3}):
        torch.save(stored, tmp_path / "none.pth")
        with pytest.raises(ValueError, match="no tensors by name"):
            ResNet(**TINY, weights=str(tmp_path / "none.pth"))


def test_a_folder_of_the_hubs_layout_and_a_name_in_the_local_hub_cache_are_read(tmp_path, monkeypatch):
    state, folder = random_state(ResNet(**TINY)), tmp_path / "resnet"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    assert_loaded(ResNet(**TINY, weights=str(folder)), state)

    repository = tmp_path / "models--timm--resnet"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert_loaded(ResNet(**TINY, weights="timm/resnet"), state)


def test_a_relative_path_is_also_looked_for_at_the_root_of_the_project(tmp_path, monkeypatch):
    state = random_state(ResNet(**TINY))
    (tmp_path / "work").mkdir()
    save_file(state, tmp_path / "work/base.safetensors")
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    assert_loaded(ResNet(**TINY, weights="work/base.safetensors"), state)


def test_what_the_cache_lacks_is_asked_of_the_hub_by_its_name(tmp_path, monkeypatch):
    state, asked = random_state(ResNet(**TINY)), []
    save_file(state, tmp_path / "model.safetensors")

    def download(name, file, local_files_only=False):
        if local_files_only:
            raise FileNotFoundError(name)
        asked.append((name, file))
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda self, name, timeout: None)
    assert_loaded(ResNet(**TINY, weights="timm/resnet"), state)
    assert asked == [("timm/resnet", "model.safetensors")]


@pytest.mark.parametrize("name", ["runs/base", "timm/net.pth", "resnet50", "./a/b", "/a/b", "a b/c"])
def test_weights_that_are_nowhere_are_an_error_that_says_what_to_give(name):
    with pytest.raises(FileNotFoundError) as error:
        ResNet(**TINY, weights=name)
    for words in (f"no weights {name!r}", "found no file", "timm/resnet50.tv_in1k", "`hf download NAME`"):
        assert words in str(error.value)
    assert ("no hub name" in str(error.value)) == (name != "a b/c")


def test_a_name_that_the_hub_does_not_give_is_an_error_with_the_reason():
    with pytest.raises(FileNotFoundError, match=r"the hub did not give it \(.*HF_HUB_OFFLINE"):
        ResNet(**TINY, weights="timm/resnet50.none")


def test_pspnet_is_read_from_its_published_file_and_from_our_checkpoint(tmp_path):
    options = {"num_classes": 3, "channels": 4}
    state = random_state(PSPNet(ResNet(**TINY, deep_stem=True, dilated=True), **options))
    body = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    heads = {k.replace("ppm.", "ppm.features."): v for k, v in state.items() if k not in body}
    heads = {k: v for k, v in heads.items() if not k.startswith("backbone.")}
    published = psp_file(body)["state_dict"]
    published = {
        k: v for k, v in published.items() if not k.startswith(("module.ppm", "module.cls", "module.aux"))
    }
    published |= {f"module.{k}": v for k, v in heads.items()} | {"module.aux.0.bias": torch.ones(1)}
    ours = {f"network.{k}": v for k, v in state.items()}
    for stored in ({"state_dict": published}, {"state_dict": ours, "global_step": 1}):
        torch.save(stored, tmp_path / "psp.pth")
        backbone = ResNet(**TINY, deep_stem=True, dilated=True)
        assert_loaded(PSPNet(backbone, weights=str(tmp_path / "psp.pth"), **options), state)
    with pytest.raises(
        ValueError, match=r"not of this PSPNet.*mismatched: cls\.4\.bias \(file \[3\], model \[5\]\)"
    ):
        PSPNet(backbone, 5, channels=4, weights=str(tmp_path / "psp.pth"))
