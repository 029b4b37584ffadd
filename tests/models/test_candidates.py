"""Candidates from labels, files and a random CLIP of a few thousand weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from functional.classes import ClassTable
from models.candidates import (
    AllCandidates,
    ClipCandidates,
    FileCandidates,
    LabelCandidates,
    caption_words,
    image_id,
    similar_to_image,
    similar_to_words,
)
from scripts.mini_diffusion.layout import write_tokenizer

COLORS = tuple((i, i, i) for i in range(6))
TABLE = ClassTable(
    "small",
    ("background", "aeroplane", "bus", "person", "dog", "toothbrush"),
    COLORS,
    ("background", "plane", "buses", "people", "dog", "toothbrush"),
)
STREET = ClassTable("street", ("road", "car", "sky"), COLORS[:3])


def names(*names: str) -> dict:
    return {"name": list(names)}


def write(path: Path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_all_candidates_are_every_class_but_the_background():
    assert AllCandidates()(names("a", "b"), TABLE) == [[1, 2, 3, 4, 5]] * 2
    assert AllCandidates()(names("a"), STREET) == [[0, 1, 2]]


def test_label_candidates_are_what_the_label_shows():
    batch = {**names("a", "b"), "label": torch.tensor([[[0, 2], [1, 255]], [[0, 0], [255, 0]]])}
    assert LabelCandidates()(batch, TABLE) == [[1, 2], []]
    assert LabelCandidates()(batch, STREET) == [[0, 1, 2], [0]]  # a table without background


def test_label_candidates_without_labels_are_an_error():
    with pytest.raises(ValueError, match=r"needs labels.*only name"):
        LabelCandidates()(names("a"), TABLE)


@pytest.mark.parametrize(
    "name",
    [
        "/home/somebody/VOCdevkit/JPEGImages/2007_000033.jpg",
        "JPEGImages/2007_000033",
        "2007_000033.JPG",
        "2007_000033.png",
        "COCO_val2014_2007_000033.jpg",
    ],
)
def test_an_image_has_one_id_however_it_is_spelt(name):
    assert image_id(name) == "2007_000033"


def test_only_file_endings_of_images_are_cut_off():
    assert image_id("scenes/front.left") == "front.left"


def test_a_file_lists_names_prompt_words_or_ids(tmp_path):
    path = write(
        tmp_path / "c.json", {"a.jpg": ["people", "aeroplane"], "b": [4, 2, 4], "c": [0, "background"]}
    )
    assert FileCandidates(path)(names("x/a.png", "b", "c"), TABLE) == [[1, 3], [2, 4], []]
    assert FileCandidates(write(tmp_path / "s.json", {"a": [0, "sky"]}))(names("a"), STREET) == [[0, 2]]


PUBLISHED = {
    "synonym_matching": {"/data/JPEGImages/1.jpg": ["dog"], "2.jpg": []},
    "image_similarity": {"/data/JPEGImages/1.jpg": ["plane"], "2.jpg": ["toothbrus"]},
    "text_similarity": {"/data/JPEGImages/1.jpg": ["plane", "buses"], "2.jpg": []},
}


def test_of_a_published_file_image_and_text_branch_are_united(tmp_path):
    path = write(tmp_path / "predict_syn_txt_0.8_img_0.97.json", PUBLISHED)
    assert FileCandidates(path)(names("1", "2"), TABLE) == [[1, 2], [5]]


@pytest.mark.parametrize(
    ("branches", "expected"),
    [
        (["image_similarity"], [[1], [5]]),
        (["text_similarity"], [[1, 2], []]),
        (["synonym_matching", "image_similarity", "text_similarity"], [[1, 2, 4], [5]]),
    ],
)
def test_the_branches_to_unite_can_be_chosen(tmp_path, branches, expected):
    assert FileCandidates(write(tmp_path / "c.json", PUBLISHED), branches)(names("1", "2"), TABLE) == expected


def test_a_misspelt_class_of_the_published_file_serves_a_table_that_spells_it_so_too(tmp_path):
    table = ClassTable("as published", ("background", "toothbrus"), COLORS[:2])
    assert FileCandidates(write(tmp_path / "c.json", {"1": ["toothbrus"]}))(names("1"), table) == [[1]]


def test_another_table_reads_the_file_anew(tmp_path):
    candidates = FileCandidates(write(tmp_path / "c.json", {"1": [1]}))
    assert candidates(names("1"), TABLE) == candidates(names("1"), STREET) == [[1]]
    candidates = FileCandidates(write(tmp_path / "d.json", {"1": [0, 1]}))
    assert candidates(names("1"), TABLE) == [[1]] and candidates(names("1"), STREET) == [[0, 1]]


def test_an_unknown_class_is_an_error_with_the_nearest_name(tmp_path):
    candidates = FileCandidates(write(tmp_path / "c.json", {"1": ["dog"], "2": ["plan"]}))
    with pytest.raises(ValueError, match=r"'plan' for '2'.*'small'.*Did you mean 'plane'"):
        candidates(names("1"), TABLE)


@pytest.mark.parametrize("unknown", [6, -1, "toothbrus"])
def test_an_id_or_misspelling_that_the_table_lacks_is_an_error(tmp_path, unknown):
    table = TABLE if isinstance(unknown, int) else STREET
    with pytest.raises(ValueError, match=rf"lists the class {unknown!r} for '1'"):
        FileCandidates(write(tmp_path / "c.json", {"1": [unknown]}))(names("1"), table)


def test_an_image_that_the_file_lacks_is_an_error_that_names_it(tmp_path):
    candidates = FileCandidates(write(tmp_path / "c.json", {"1": ["dog"], "2": []}))
    with pytest.raises(ValueError, match=r"no candidates for the image 'train/3'.*2 images, such as 1, 2"):
        candidates(names("1", "train/3"), TABLE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a/1.jpg": ["dog"], "b/1.jpg": ["bus"]}, "lists the image '1' twice, now as 'b/1.jpg'"),
        ({"1": "dog"}, "must list names or ids of classes for each image but has 'dog' for '1'"),
        ({"1": [["dog"]]}, "must list names or ids of classes"),
        ({"image_similarity": {}}, "lacks the branches text_similarity: found image_similarity"),
    ],
)
def test_a_faulty_file_is_an_error_at_once(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        FileCandidates(write(tmp_path / "c.json", content))


def test_no_file_and_no_such_branch_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"c\.json"):
        FileCandidates(str(tmp_path / "c.json"))
    path = write(tmp_path / "c.json", PUBLISHED)
    with pytest.raises(ValueError, match=r"lacks the branches synonyms: found synonym_matching, image"):
        FileCandidates(path, ["synonyms"])


def test_classes_as_similar_to_the_image_as_the_threshold_times_the_best_pass():
    similarity = torch.tensor([0.30, 0.295, 0.28])  # 0.97 * 0.30 = 0.291
    assert similar_to_image(similarity, 0.97) == [0, 1]
    assert similar_to_image(100 * similarity, 0.97) == [0, 1]  # whatever the logit scale
    assert similar_to_image(similarity, 1.0) == [0] and similar_to_image(similarity, 0.9) == [0, 1, 2]


def test_the_class_most_similar_to_the_image_passes_whatever_its_sign():
    assert similar_to_image(torch.tensor([-0.2, -0.1, -0.1005]), 0.97) == [1]


def test_classes_more_similar_than_the_threshold_to_some_word_pass():
    similarity = torch.tensor([[0.1, 0.81], [0.8, 0.2], [0.9, 0.95]])
    assert similar_to_words(similarity, 0.8) == [0, 2]  # 0.8 itself is not more
    assert similar_to_words(similarity, 0.7) == [0, 1, 2]
    assert similar_to_words(similarity[:, :0], 0.8) == []


def test_words_of_a_caption_are_what_may_name_a_thing():
    caption = "there is a Red bus next to a dog and another dog on the 2 lane street's side"
    assert caption_words(caption) == ["bus", "dog", "lane", "street"]
    assert caption_words("an orange") == ["orange"]  # a colour, but a class of COCO too


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    words = (
        "a",
        "photo",
        "of",
        "plane",
        "buses",
        "people",
        "dog",
        "tooth",
        "brush",
        "road",
        "car",
        "sky",
        "bus",
    )
    size = write_tokenizer(folder, 24, words)
    text = {"vocab_size": size, "max_position_embeddings": 24, "initializer_factor": 5.0}
    text |= {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    vision = {"image_size": 32, "patch_size": 16, "initializer_factor": 5.0}
    for config in (text, vision):
        config |= {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 12}
        config |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        CLIPModel(config).save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    return folder


@pytest.fixture
def batch():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 40, 60), dtype=np.uint8)
    return {"image": torch.from_numpy(pixels) / 255, **names("x", "y", "z")}


class Says:
    """Stands for a Captioner that has seen everything."""

    key = "captioner 0123"

    def __init__(self, first: str, second: str = "a picture of"):
        self.captions, self.calls = [first, second], []

    def __call__(self, image, name, prefixes):
        self.calls.append((tuple(image.shape), name, list(prefixes)))
        return self.captions


def cosines(folder: Path, batch: dict, table: ClassTable) -> torch.Tensor:
    """Similarity of images and classes by the forward pass of the library."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor((batch["image"] * 255).round().byte(), return_tensors="pt")
    words = table.words[int(table.has_background) :]
    text = tokenizer([f"A photo of a {word}" for word in words], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**pixels, **text).logits_per_image / model.logit_scale.exp()


@pytest.mark.parametrize(("table", "first"), [(TABLE, 1), (STREET, 0)])
@pytest.mark.parametrize("threshold", [0.97, 0.5, 0.01])
def test_the_image_branch_follows_the_similarities_of_clip(clip, batch, table, first, threshold):
    rows = cosines(clip, batch, table)
    expected = [[first + i for i in similar_to_image(row, threshold)] for row in rows]
    assert ClipCandidates(str(clip), threshold)(batch, table) == expected


def test_a_lower_image_threshold_lets_more_classes_pass(clip, batch):
    few, many = (ClipCandidates(str(clip), threshold)(batch, TABLE) for threshold in (0.97, 0.01))
    assert sum(map(len, few)) < sum(map(len, many))
    assert all(set(a) <= set(b) and a for a, b in zip(few, many, strict=True))


def test_the_text_branch_finds_the_class_that_the_caption_names(clip, batch):
    image_only = ClipCandidates(str(clip), 1.0)(batch, TABLE)
    says = Says("two people and the buses", "a picture of zebra")
    both = ClipCandidates(str(clip), 1.0, text_threshold=0.9999, captioner=says)(batch, TABLE)
    assert both == [sorted({*found, 2, 3}) for found in image_only]
    assert says.calls[1] == ((3, 40, 60), "y", ["", "A picture of"])


def test_a_word_is_the_mean_of_its_own_tokens_before_the_projection(clip):
    candidates = ClipCandidates(str(clip))
    candidates.clip.load(torch.device("cpu"))
    found = candidates.encode_words(["toothbrush", "dog"])  # of several tokens and of one, so one is padded
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    for word, features in zip(["toothbrush", "dog"], found, strict=True):
        tokens = tokenizer(word, return_tensors="pt")
        with torch.no_grad():
            states = model.text_model(**tokens).last_hidden_state[0, 1:-1]
        assert (len(states) > 1) == (word == "toothbrush")
        torch.testing.assert_close(features, F.normalize(states.mean(0), dim=0))


def test_a_lower_text_threshold_lets_more_classes_pass(clip, batch):
    found = [
        ClipCandidates(str(clip), 1.0, threshold, Says("a dog"))(batch, TABLE) for threshold in (0.9999, -1.0)
    ]
    assert all(4 in a and len(a) < 5 for a in found[0]) and found[1] == [[1, 2, 3, 4, 5]] * 3


def test_the_words_of_the_prefix_itself_do_not_count(clip, batch):
    table = ClassTable("pictures", ("background", "picture", "dog", "road"), COLORS[:4])
    image_only = ClipCandidates(str(clip), 1.0)(batch, table)
    assert ClipCandidates(str(clip), 1.0, 0.9999, Says("", "a picture of"))(batch, table) == image_only
    pictures = ClipCandidates(str(clip), 1.0, 0.9999, Says("", "a picture of a picture"))(batch, table)
    assert all(1 in found for found in pictures)


def test_classes_are_encoded_once_for_each_list(clip, batch):
    candidates, calls = ClipCandidates(str(clip)), []
    candidates.clip.load(torch.device("cpu"))
    candidates.clip.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    first = candidates(batch, TABLE)
    assert candidates(batch, TABLE) == first and len(calls) == 2  # prompts and names
    assert candidates(batch, STREET) == ClipCandidates(str(clip))(batch, STREET) and len(calls) == 4


def test_kept_candidates_need_neither_weights_nor_captions(clip, batch, tmp_path):
    cache = str(tmp_path / "new" / "candidates.json")
    found = ClipCandidates(str(clip), 0.5, 0.9, Says("a dog"), cache)(batch, TABLE)
    says = Says("people")
    again = ClipCandidates(str(clip), 0.5, 0.9, says, cache)
    assert again(batch, TABLE) == found and again.clip.model is None and says.calls == []


def test_only_images_that_are_not_kept_are_looked_at(clip, batch, tmp_path):
    expected = ClipCandidates(str(clip), 0.5)(batch, TABLE)
    candidates = ClipCandidates(str(clip), 0.5, cache=str(tmp_path / "c.json"))
    one = {"image": batch["image"][1:2], **names("y")}
    assert candidates(one, TABLE) == expected[1:2]
    seen = []
    candidates.clip.model.vision_model.register_forward_hook(
        lambda m, i, o: seen.append(len(o.pooler_output))
    )
    assert candidates(batch, TABLE) == expected and seen == [2]


@pytest.mark.parametrize(
    "change", [{"image_threshold": 0.01}, {"text_threshold": -1.0}, {"captioner": None}, {"table": STREET}]
)
def test_candidates_of_another_choice_are_not_taken_from_the_cache(clip, batch, tmp_path, change):
    options = {"image_threshold": 0.97, "text_threshold": 0.9999, "captioner": Says("people")}
    cache = str(tmp_path / "c.json")
    before = ClipCandidates(str(clip), **options, cache=cache)(batch, TABLE)
    table = change.get("table", TABLE)
    options |= {key: value for key, value in change.items() if key != "table"}
    after = ClipCandidates(str(clip), **options, cache=cache)(batch, table)
    assert after == ClipCandidates(str(clip), **options)(batch, table) != before
    assert len(json.loads(Path(cache).read_text())) == 2


def test_candidates_of_weights_that_were_replaced_are_not_taken_from_the_cache(clip, batch, tmp_path):
    cache, folder = str(tmp_path / "c.json"), tmp_path / "clip"
    shutil.copytree(clip, folder)
    found = ClipCandidates(str(folder), 0.5, cache=cache)(batch, TABLE)
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"] *= -1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    again = ClipCandidates(str(folder), 0.5, cache=cache)(batch, TABLE)
    assert again == ClipCandidates(str(folder), 0.5)(batch, TABLE) != found


def test_without_a_cache_equal_names_do_not_mix_images(clip, batch):
    candidates = ClipCandidates(str(clip), 0.9)
    expected = candidates(batch, TABLE)
    assert candidates({**batch, **names("same", "same", "same")}, TABLE) == expected
    one_by_one = [candidates({"image": image[None], **names("same")}, TABLE)[0] for image in batch["image"]]
    assert one_by_one == expected and expected[0] != expected[2]


def test_what_clip_found_can_be_read_as_a_file(clip, batch, tmp_path):
    cache = tmp_path / "c.json"
    found = ClipCandidates(str(clip), 0.97, 0.9999, Says("a dog"), str(cache))(batch, TABLE)
    assert FileCandidates(str(cache))(batch, TABLE) == found
    assert FileCandidates(str(cache), ["text_similarity"])(batch, TABLE) == [[4]] * 3
    ClipCandidates(str(clip), 0.5, cache=str(cache))(batch, TABLE)
    with pytest.raises(ValueError, match="found under 2 choices"):
        FileCandidates(str(cache))


def test_what_clip_found_without_a_captioner_can_be_read_as_a_file_too(clip, batch, tmp_path):
    cache = tmp_path / "c.json"
    found = ClipCandidates(str(clip), cache=str(cache))(batch, STREET)
    assert FileCandidates(str(cache))(batch, STREET) == found


def test_similarities_are_in_float32_under_autocast_too(clip, batch):
    candidates, types = ClipCandidates(str(clip)), set()
    candidates.clip.load(torch.device("cpu"))
    for module in candidates.clip.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        candidates(batch, TABLE)
    assert types == {torch.float32}


@pytest.mark.parametrize(
    "options", [{"image_threshold": 0.0}, {"image_threshold": 97}, {"text_threshold": 2.0}]
)
def test_a_threshold_outside_its_range_is_an_error(clip, options):
    with pytest.raises(ValueError, match=r"image_threshold must be in .*found.*0\.97 and 0\.8"):
        ClipCandidates(str(clip), **options)


def test_a_missing_model_and_a_damaged_cache_are_errors_at_once(clip, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks config.json"):
        ClipCandidates(str(tmp_path / "clip"))
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ValueError, match=r"c\.json is not JSON"):
        ClipCandidates(str(clip), cache=str(tmp_path / "c.json"))
