"""BLIP's captions on a random BLIP of a few thousand weights, in the folder layout of the published one."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration, CLIPModel, CLIPTokenizer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import models.captions
from models.captions import MAX_TOKENS, Captioner, JsonFile, VisionLanguageModel, find_folder, preprocess
from tests.tiny_blip import write_tiny_blip


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return write_tiny_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture
def image():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8)) / 255


PREFIXES = (
    "",
    "a photograph of plane",
    "a photography of traffic light",
    "a photograph of cat",
    "a picture of",
)


def count_calls(module: torch.nn.Module) -> list:
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_caption_is_what_blips_own_greedy_generation_gives(blip, image):
    model = BlipForConditionalGeneration.from_pretrained(blip).eval()
    captioner = Captioner(str(blip))
    pixels = BlipImageProcessorPil.from_pretrained(blip)((image * 255).round().byte(), return_tensors="pt")
    captions = captioner(image, "x", PREFIXES)
    for prefix, caption in zip(PREFIXES, captions, strict=True):
        ids = captioner.blip.tokenizer(prefix, return_tensors="pt")["input_ids"]  # with [CLS] and [SEP]
        written = model.generate(**pixels, input_ids=ids, max_length=20, num_beams=1, do_sample=False)
        assert caption == captioner.blip.tokenizer.decode(written[0], skip_special_tokens=True)
    assert len({caption.removeprefix(p) for p, caption in zip(PREFIXES, captions, strict=True)}) > 3


def test_a_caption_does_not_depend_on_the_other_prefixes(blip, image):
    captioner = Captioner(str(blip))
    assert captioner(image, "x", PREFIXES) == [captioner(image, "x", [p])[0] for p in PREFIXES]
    assert captioner(image, "x", PREFIXES[::-1]) == captioner(image, "x", PREFIXES)[::-1]


def test_captions_are_about_the_image(blip, image):
    captioner = Captioner(str(blip))
    assert captioner(image, "x", PREFIXES) != captioner(1 - image, "x", PREFIXES)


def test_the_image_is_seen_once_and_equally_long_prefixes_are_continued_together(blip, image, monkeypatch):
    captioner = Captioner(str(blip))
    captioner.blip.load(image.device)
    seen, batches, one_by_one = count_calls(captioner.blip.model.vision_model), [], captioner.continue_text
    monkeypatch.setattr(captioner, "continue_text", lambda s, v: batches.append(len(s)) or one_by_one(s, v))
    captions = captioner(image, "x", PREFIXES)
    assert len(seen) == 1 and batches == [1, 1, 2, 1]  # begin of text alone, 4, 5 and 6 tokens
    monkeypatch.setattr(models.captions, "PREFIXES_PER_PASS", 1)
    assert captioner(image, "x", PREFIXES) == captions and batches[4:] == [1] * 5


def test_a_caption_has_at_most_twenty_tokens_with_its_begin_and_prefix(blip, image):
    captioner = Captioner(str(blip))
    captions = captioner(1 - image, "x", PREFIXES)
    tokens = [
        len(captioner.blip.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in captions
    ]
    assert max(tokens) == MAX_TOKENS == 20


def test_a_caption_begins_with_the_prefix_in_lower_case(blip, image):
    captions = Captioner(str(blip))(image, "x", ["A Photograph of CAT", "a photograph of cat "])
    assert captions[0] == captions[1] and captions[0].startswith("a photograph of cat ")


def test_pieces_glued_to_the_class_name_are_left_out(blip, image):
    captioner = Captioner(str(blip))
    captioner.blip.load(image.device)
    ids = captioner.blip.tokenizer.convert_tokens_to_ids(["##s", "##ing", "flying", "cat", "##s"])
    assert captioner.join("a photograph of plane", ids) == "a photograph of plane flying cats"
    assert captioner.join("a photograph of plane", ids[:1]) == "a photograph of plane"


def test_kept_captions_need_no_weights(blip, image, tmp_path):
    cache = str(tmp_path / "new" / "captions.json")
    captions = Captioner(str(blip), cache)(image, "x", PREFIXES)
    again = Captioner(str(blip), cache)
    assert again(image, "x", PREFIXES[::-1]) == captions[::-1] and again.blip.model is None


def test_only_what_is_not_kept_is_written(blip, image, tmp_path, monkeypatch):
    captioner = Captioner(str(blip), str(tmp_path / "captions.json"))
    asked, generate = [], captioner.generate
    monkeypatch.setattr(captioner, "generate", lambda i, p: asked.append(list(p)) or generate(i, p))
    captioner(image, "x", PREFIXES[:2])
    captioner(image, "x", [PREFIXES[1], PREFIXES[2], PREFIXES[2]])
    captioner(image, "y", PREFIXES[:1])
    assert asked == [list(PREFIXES[:2]), [PREFIXES[2]], [PREFIXES[0]]]
    kept = json.loads((tmp_path / "captions.json").read_text())
    assert list(kept) == [captioner.key] and set(kept[captioner.key]["x"]) == set(PREFIXES[:3])


def test_without_a_cache_equal_names_do_not_mix_images(blip, image):
    captioner = Captioner(str(blip))
    first = captioner(image, "same", PREFIXES)
    assert captioner(1 - image, "same", PREFIXES) != first


def test_captions_of_another_model_are_not_taken_from_the_cache(blip, image, tmp_path):
    cache = str(tmp_path / "captions.json")
    captions = Captioner(str(blip), cache)(image, "x", PREFIXES)
    other = write_tiny_blip(tmp_path / "other", seed=1)
    assert Captioner(str(other), cache)(image, "x", PREFIXES) != captions


def test_kept_captions_belong_to_the_weights_and_not_to_their_place(blip, image, tmp_path):
    cache, copy = str(tmp_path / "captions.json"), tmp_path / blip.name
    captions = Captioner(str(blip), cache)(image, "x", PREFIXES)
    shutil.copytree(blip, copy)
    moved = Captioner(str(copy), cache)
    assert moved(image, "x", PREFIXES) == captions and moved.blip.model is None
    replaced = write_tiny_blip(copy, seed=1)
    assert Captioner(str(replaced), cache)(image, "x", PREFIXES) != captions


def test_the_weights_are_read_at_the_first_caption_and_leave_the_global_generator_alone(blip, image):
    captioner = Captioner(str(blip))
    assert captioner.blip.model is None
    state = torch.get_rng_state()
    captioner(image, "x", [""])
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        not any(p.requires_grad for p in captioner.blip.model.parameters())
        and not captioner.blip.model.training
    )


def test_captions_are_written_in_float32_under_autocast_too(blip, image):
    captioner, types = Captioner(str(blip)), set()
    captioner.blip.load(image.device)
    for module in captioner.blip.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        captioner(image, "x", [""])
    assert types == {torch.float32}


def test_two_processes_may_fill_one_file(tmp_path):
    path = str(tmp_path / "cache.json")
    first, second = JsonFile(path), JsonFile(path)
    first.add({"model": {"a": {"": "one"}}})
    second.add({"model": {"b": {"": "two"}}})
    first.add({"model": {"a": {"of": "three"}}})
    content = {"model": {"a": {"": "one", "of": "three"}, "b": {"": "two"}}}
    assert first.content == JsonFile(path).content == content
    assert [file.name for file in tmp_path.iterdir()] == ["cache.json"]


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = JsonFile(str(tmp_path / "cache.json"))
    file.add({"a": 1})

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(models.captions.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        file.add({"b": 2})
    assert JsonFile(str(tmp_path / "cache.json")).content == {"a": 1}


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "holds a list")])
def test_a_damaged_cache_is_an_error_that_names_it(blip, tmp_path, text, message):
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(ValueError, match=rf"captions\.json.*{message}"):
        Captioner(str(blip), str(tmp_path / "captions.json"))


def test_a_prefix_that_leaves_no_room_is_an_error(blip, image):
    with pytest.raises(ValueError, match=r"23 tokens.*end at 20"):
        Captioner(str(blip))(image, "x", ["cat", "a cat " * 11])


@pytest.mark.parametrize("path", ["/nowhere/blip", "./nowhere/blip", "models/blip", "blip"])
def test_a_folder_that_is_not_there_is_an_error_at_once(path, monkeypatch):
    monkeypatch.setattr(models.captions, "HfApi", None)
    with pytest.raises(FileNotFoundError, match=r"blip' lacks config.json; .*hub: not asked.*a folder"):
        Captioner(path)


def test_a_folder_may_be_given_from_the_root_of_the_project(blip, monkeypatch):
    monkeypatch.setattr(models.captions, "ROOT", blip.parent)
    assert find_folder(blip.name) == blip


def test_an_incomplete_folder_is_an_error_that_names_the_files(blip, tmp_path):
    folder = shutil.copytree(blip, tmp_path / "copy")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model.safetensors; tokenizer.json or vocab.txt"):
        Captioner(str(folder))


def test_a_model_of_another_kind_is_an_error(blip):
    with pytest.raises(ValueError, match="says 'blip', not 'clip'"):
        VisionLanguageModel(str(blip), CLIPModel, CLIPTokenizer)


def test_missing_and_mismatched_weights_are_an_error_that_names_them(blip, image, tmp_path):
    folder = shutil.copytree(blip, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    missing = next(key for key in weights if key.endswith("crossattention.self.query.weight"))
    del weights[missing]
    weights["vision_model.post_layernorm.bias"] = torch.zeros(3)
    weights["vision_model.extra"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError) as error:
        Captioner(str(folder))(image, "x", [""])
    for part in (
        f"missing: {missing}",
        "unexpected: vision_model.extra",
        "post_layernorm.bias (file [3], model [16])",
    ):
        assert part in str(error.value)


def test_the_positions_that_older_files_hold_are_no_error(blip, image, tmp_path):
    folder = shutil.copytree(blip, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights["text_decoder.bert.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert Captioner(str(folder))(image, "x", PREFIXES) == Captioner(str(blip))(image, "x", PREFIXES)


def test_a_copy_in_the_hub_cache_is_used_before_any_network(blip, monkeypatch):
    monkeypatch.setattr(models.captions, "snapshot_download", lambda name, local_files_only: str(blip))
    monkeypatch.setattr(models.captions, "HfApi", None)
    assert find_folder("owner/blip") == blip


def fake_hub(monkeypatch, folder: Path) -> list:
    asked = []

    def snapshot_download(name, local_files_only=False, allow_patterns=None):
        if local_files_only:
            raise FileNotFoundError
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(models.captions, "snapshot_download", snapshot_download)
    hub = SimpleNamespace(model_info=lambda name, timeout: None)
    monkeypatch.setattr(models.captions, "HfApi", lambda: hub)
    return asked


def test_the_hub_is_asked_for_safetensors_only(blip, monkeypatch):
    asked = fake_hub(monkeypatch, blip)
    assert find_folder("owner/blip") == blip
    assert len(asked) == 1 and "model.safetensors" in asked[0] and not any("bin" in part for part in asked[0])


def test_a_hub_model_without_safetensors_is_an_error_that_says_so(blip, tmp_path, monkeypatch):
    folder = shutil.copytree(blip, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    fake_hub(monkeypatch, folder)
    with pytest.raises(FileNotFoundError, match=r"lacks model.safetensors in .*save_pretrained"):
        find_folder("owner/blip")


def test_a_hub_that_does_not_answer_is_an_error_with_a_way_out():
    with pytest.raises(
        FileNotFoundError, match=r"'owner/blip' lacks config.json.*hub: .*offline.*hf download"
    ):
        Captioner("owner/blip")


@pytest.mark.parametrize("shape", [(3, 40, 60), (3, 61, 40), (3, 20, 20)])
@pytest.mark.parametrize(
    "processor",
    [
        BlipImageProcessorPil(size={"height": 32, "width": 24}),
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size={"height": 28, "width": 30}, resample=2),
    ],
)
def test_an_image_looks_as_the_models_own_processor_makes_it(processor, shape, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = processor(torch.from_numpy(pixels), return_tensors="pt")["pixel_values"]
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    found = preprocess(torch.from_numpy(pixels) / 255, settings)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_sizes_are_read_from_older_and_newer_files_alike(tmp_path):
    image, plain = (
        torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0)),
        {"image_mean": [0.5] * 3},
    )
    plain |= {"image_std": [0.5] * 3}
    square = {**plain, "size": {"height": 32, "width": 32}}
    cropped = {**plain, "do_center_crop": True, "size": {"shortest_edge": 32}}
    cropped["crop_size"] = {"height": 30, "width": 30}
    torch.testing.assert_close(preprocess(image, {**plain, "size": 32}), preprocess(image, square))
    older = {**cropped, "size": 32, "crop_size": 30}
    torch.testing.assert_close(preprocess(image, older), preprocess(image, cropped))


def test_what_newer_versions_of_transformers_write_is_read_too(blip, image, tmp_path):
    folder = shutil.copytree(blip, tmp_path / "copy")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert Captioner(str(folder))(image, "x", PREFIXES) == Captioner(str(blip))(image, "x", PREFIXES)
