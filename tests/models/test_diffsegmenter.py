"""DiffSegmenter against its plain order: one class at a time, all attention explicit, an empty prompt too."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functional.attention_maps import (
    complete,
    fuse_levels,
    level_size,
    mean_by_level,
    sharpen,
    stretch,
    word_map,
)
from functional.classes import CITYSCAPES19, ClassTable
from functional.noise import named_generator, named_noise
from models.diffsegmenter import DiffSegmenter, best_class, label_map
from models.diffusion.attention import attention_layers, record_attention
from models.diffusion.conditioning import token_positions
from models.diffusion.stable_diffusion import StableDiffusion
from models.prompts import PromptStyle

WORDS = ["car", "hot dog", "tree"]
CAPTIONS = ["a photograph of car flying on grass", "a photograph of hot dog", "a photograph of tree on grass"]


@pytest.fixture(scope="module")
def diffusion(model_folder):
    """A random model whose attention is sharp enough that what is stretched is no rounding error."""
    model = StableDiffusion(str(model_folder))
    with torch.no_grad():
        for layer in attention_layers(model.unet, "self") + attention_layers(model.unet, "cross"):
            attn = model.unet.get_submodule(layer)
            attn.to_q.weight *= 4
            attn.to_k.weight *= 4
    return model


@pytest.fixture
def image():
    return torch.rand(3, 40, 52, generator=torch.Generator().manual_seed(1))


def build(diffusion, **options):
    return DiffSegmenter(diffusion, **{"size": (64, 64), **options})


def latent_maps(model, image, name="x"):
    """What is resized and stretched."""
    prompts = model.prompts(WORDS)
    texts = model.prompt.encode(model.diffusion, prompts)
    return model.latent_maps(model.encode(image, name), name, prompts, texts)


def assert_maps(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@torch.no_grad()
def plain_map(model: DiffSegmenter, image, name, word, caption=None):
    """The stretched map of one class: for each view a call of two rows, the empty prompt and the class's."""
    diffusion, unet = model.diffusion, model.diffusion.unet
    latent = diffusion.encode(F.interpolate(image[None], model.size, mode="bilinear", align_corners=False))
    size, maps = latent.shape[-2:], []
    text = caption or f"a photograph of {word}"
    tokens = token_positions(diffusion.tokenizer, text, word)[-1:]
    empty, context = diffusion.encode_text(["", text])
    context = context.clone()
    context[tokens] = empty[tokens] + 1.21 * (context[tokens] - empty[tokens])
    if " flying" in text:
        tokens = [*tokens, tokens[-1] + 1]
    for timestep in model.timesteps:
        for k in range(model.noises):
            noise = named_noise([f"{name} noise {k}" if k else name], latent.shape[1:], model.seed)
            alpha_bar = diffusion.alpha_bars[timestep].item()
            noised = math.sqrt(alpha_bar) * latent + math.sqrt(1 - alpha_bar) * noise
            layers = {kind: attention_layers(unet, kind) for kind in ("self", "cross")}
            with record_attention(unet, layers["self"] + layers["cross"]) as weights:
                unet(noised.expand(2, -1, -1, -1), timestep, torch.stack([empty, context]))
            levels = {
                kind: mean_by_level({layer: weights[layer][1:] for layer in names})
                for kind, names in layers.items()
            }
            cross = {r: word_map(one, [tokens], level_size(size, r)) for r, one in levels["cross"].items()}
            fused = fuse_levels(cross, size, model.level_weights)
            for _ in range(model.self_power):
                fused = complete(levels["self"][0], fused)
            maps.append(fused)
    completed = torch.stack(maps).mean(0)
    return stretch(F.interpolate(completed[None], image.shape[-2:], mode="bilinear", align_corners=False)[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"self_power": 0},
        {"self_power": 2},
        {"max_rows": 1},
        {"max_rows": 2, "timesteps": (50, 150), "noises": 2},
        {"max_rows": 100, "timesteps": (20, 100, 500), "self_power": 2},
        {"noises": 3, "seed": 5},
        {"size": (64, 32), "level_weights": (0.4, 0.3, 0.2, 0.1)},
        {"level_weights": (0, 0.6, 0.4, 0)},
        {"level_weights": (0, 0, 0, 1), "self_power": 0},
    ],
    ids=str,
)
def test_score_maps_are_those_of_the_plain_order(diffusion, image, options):
    model = build(diffusion, **options)
    found = model.score_maps(image, "x", WORDS, CAPTIONS)
    plain = [plain_map(model, image, "x", *pair) for pair in zip(WORDS, CAPTIONS, strict=True)]
    assert found.shape == (3, 40, 52) and found.dtype == torch.float32
    # The square of S leaves 1 % of a map's range, and stretching enlarges the rounding with it.
    assert_maps(found, torch.cat(plain), atol=1e-5 if model.self_power < 2 else 5e-5)
    assert (found.amin((1, 2)) == 0).all() and (found.amax((1, 2)) == 1).all()


def test_without_captions_the_prompt_is_bare(diffusion, image):
    model = build(diffusion)
    found = model.score_maps(image, "x", WORDS)
    assert_maps(found, torch.cat([plain_map(model, image, "x", word) for word in WORDS]))
    assert not torch.allclose(found, model.score_maps(image, "x", WORDS, CAPTIONS), atol=1e-3)


def test_a_map_depends_on_no_other_class(diffusion, image):
    model = build(diffusion, max_rows=2)
    found = model.score_maps(image, "x", WORDS)
    assert_maps(model.score_maps(image, "x", WORDS[::-1]).flip(0), found)
    for word, one in zip(WORDS, found, strict=True):
        assert_maps(model.score_maps(image, "x", [word])[0], one)
    assert not torch.allclose(found[0], found[2], atol=1e-2)


class Calls:
    """Counts calls of modules and the rows of the U-Net's, inside the block."""

    def __init__(self, **modules):
        self.modules, self.count, self.rows = modules, Counter(), []

    def __enter__(self):
        def count(name):
            return lambda module, args: self.count.update([name])

        self.handles = [
            module.register_forward_pre_hook(count(name)) for name, module in self.modules.items()
        ]
        if "unet" in self.modules:
            look = self.modules["unet"].register_forward_pre_hook(
                lambda _, args: self.rows.append(len(args[0]))
            )
            self.handles.append(look)
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(("max_rows", "rows"), [(1, [1] * 12), (5, [5, 5, 2]), (12, [12]), (100, [12])])
def test_the_rows_of_a_call_change_the_calls_and_not_the_maps(diffusion, image, max_rows, rows):
    options = {"timesteps": (50, 150), "noises": 2}
    with Calls(unet=diffusion.unet) as calls:
        found = build(diffusion, max_rows=max_rows, **options).score_maps(image, "x", WORDS)
    assert calls.rows == rows
    assert_maps(found, build(diffusion, **options).score_maps(image, "x", WORDS))


def test_the_unet_runs_no_further_than_the_last_level_of_any_weight(diffusion, image):
    options = {"level_weights": (0, 0, 0, 1), "self_power": 0}
    with Calls(middle=diffusion.unet.mid_block, after=diffusion.unet.up_blocks[0]) as calls:
        build(diffusion, **options).score_maps(image, "x", WORDS)
        assert calls.count == {"middle": 1}
        build(diffusion, **options | {"self_power": 1}).score_maps(image, "x", WORDS)
    assert calls.count == {"middle": 2, "after": 1}


def test_texts_are_encoded_once_and_an_image_once(model_folder, image):
    diffusion = StableDiffusion(str(model_folder))
    model = build(diffusion, timesteps=(50, 150), noises=2, max_rows=3)
    with Calls(text=diffusion.text_encoder, image=diffusion.vae.encoder) as calls:
        model.score_maps(image, "x", WORDS)
        assert calls.count == {"text": 2, "image": 1}  # the empty text is one of its own
        model.score_maps(1 - image, "y", WORDS[::-1])
    assert calls.count == {"text": 2, "image": 2}


def test_prompts_with_captions_are_encoded_together_and_not_kept(model_folder, image):
    diffusion = StableDiffusion(str(model_folder))
    with Calls(text=diffusion.text_encoder) as calls:
        for _ in range(2):
            build(diffusion).score_maps(image, "x", WORDS, CAPTIONS)
            assert set(diffusion.text_cache) == {""}
    assert calls.count == {"text": 3}
    build(diffusion).score_maps(image, "x", WORDS)
    assert set(diffusion.text_cache) == {"", *(f"a photograph of {word}" for word in WORDS)}


class Shapes(TorchDispatchMode):
    """Inside the block `seen` collects the shapes of all that any operation gives."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


def test_no_self_attention_is_ever_built(diffusion, image):
    model = build(diffusion, self_power=2, size=(64, 96))  # 16 * 24 = 384 places, which is no layer's width
    with Shapes() as shapes:
        model.score_maps(image, "x", WORDS)
    assert (6, 384, 16) in shapes.seen  # the attention of 3 rows and 2 heads to the tokens of the text
    assert not any(shape[-2:] == (384, 384) for shape in shapes.seen)
    with Shapes() as shapes:
        plain_map(model, image, "x", "car")
    assert any(shape[-2:] == (384, 384) for shape in shapes.seen)


def test_the_unet_is_as_it_was_after_score_maps_and_after_an_exception(diffusion, image):
    before = dict(diffusion.unet.attn_processors)
    build(diffusion).score_maps(image, "x", WORDS)
    assert diffusion.unet.attn_processors == before

    def fail(*_):
        raise RuntimeError("mine")

    handle = diffusion.unet.up_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mine"):
        build(diffusion).score_maps(image, "x", WORDS)
    handle.remove()
    assert diffusion.unet.attn_processors == before


def test_the_unet_sees_the_latent_at_timestep_100_with_the_noise_of_the_images_name(diffusion, image):
    model, seen = build(diffusion), {}
    handle = diffusion.unet.register_forward_pre_hook(
        lambda _, args: seen.update(latent=args[0], timestep=args[1])
    )
    model.score_maps(image, "x", WORDS)
    handle.remove()
    latent = diffusion.encode(F.interpolate(image[None], (64, 64), mode="bilinear", align_corners=False))
    noise = named_noise(["x"], (4, 16, 16), seed=4307)
    expected = 0.94563 * latent + 0.32523 * noise
    torch.testing.assert_close(seen["latent"], expected.expand(3, -1, -1, -1), atol=2e-5, rtol=2e-5)
    assert seen["timestep"].tolist() == [100] * 3
    one = torch.ones(1, 4, 2, 2)
    torch.testing.assert_close(diffusion.add_noise(one, one, 100), 1.27086 * one, rtol=1e-4, atol=0)


def test_the_maps_depend_on_image_name_and_seed_and_on_no_other_random_number(diffusion, image):
    model = build(diffusion)
    found = model.score_maps(image, "x", WORDS)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for other in ("y", "z"):
        model.score_maps(1 - image, other, WORDS[:1])
    assert torch.equal(model.score_maps(image, "x", WORDS), found)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(model.score_maps(image, "y", WORDS), found, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"size": (32, 64)},
        {"timesteps": (150,)},
        {"timesteps": (100, 150)},
        {"noises": 2},
        {"seed": 1},
        {"level_weights": (0.3, 0.5, 0.1, 0.1)},
        {"self_power": 0},
        {"self_power": 2},
        {"contrast": (8, 0.4)},
        {"normalize": "joint"},
        {"sample_posterior": True},
        {"prompt": PromptStyle("a photo of a")},
        {"prompt": PromptStyle(emphasis=1.0)},
        {"prompt": PromptStyle(tokens="mean")},
        {"prompt": PromptStyle(ing=False)},
        {"prompt": PromptStyle(ing_offset=1)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_each_option_changes_the_maps(diffusion, image, options):
    captions = CAPTIONS
    if "prompt" in options:
        start = options["prompt"].start
        captions = [start(word) + text.partition(word)[2] for word, text in zip(WORDS, CAPTIONS, strict=True)]
    found = build(diffusion, **options).score_maps(image, "x", WORDS, captions)
    plain = build(diffusion).score_maps(image, "x", WORDS, CAPTIONS)
    assert found.shape == plain.shape and (found - plain).abs().max() > 1e-3


def test_the_maps_of_timesteps_and_noises_are_averaged_before_they_are_resized(diffusion, image):
    both = build(diffusion, timesteps=(50, 150), noises=2)
    means = [latent_maps(build(diffusion, timesteps=(t,), noises=2), image) for t in (50, 150)]
    assert_maps(latent_maps(both, image), torch.stack(means).mean(0))
    resized = F.interpolate(latent_maps(both, image)[None], (40, 52), mode="bilinear", align_corners=False)[0]
    assert_maps(both.score_maps(image, "x", WORDS), stretch(resized))


def test_the_first_noise_is_that_of_one_and_further_ones_are_others_than_those_of_the_next_seed(
    diffusion, image
):
    seen = []
    handle = diffusion.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for options in ({}, {"noises": 3}, {"seed": 4308}):
        build(diffusion, **options).score_maps(image, "x", ["car"])
    handle.remove()
    (one,), three, (next_seed,) = seen
    assert torch.equal(three[0], one)
    rows = [*three, next_seed]
    assert not any(torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])


def test_joint_maps_of_an_image_keep_their_order_and_share_their_ends(diffusion, image):
    model = build(diffusion, normalize="joint")
    maps = F.interpolate(latent_maps(model, image)[None], (40, 52), mode="bilinear", align_corners=False)[0]
    expected = (maps - maps.min()) / (maps.max() - maps.min())
    assert_maps(model.score_maps(image, "x", WORDS), expected)
    one = model.score_maps(image, "x", WORDS[:1])
    assert_maps(one, build(diffusion).score_maps(image, "x", WORDS[:1]))


@pytest.mark.parametrize("normalize", ["per_class", "joint"])
def test_contrast_comes_last(diffusion, image, normalize):
    plain = build(diffusion, normalize=normalize).score_maps(image, "x", WORDS)
    found = build(diffusion, normalize=normalize, contrast=(8, 0.4)).score_maps(image, "x", WORDS)
    if normalize == "joint":
        plain = plain.flatten(0, 1)  # as one map of all classes
    assert_maps(found, sharpen(plain, 8, 0.4).view_as(found))


def test_a_posterior_sample_is_drawn_for_the_name_and_the_seed(diffusion, image):
    model = build(diffusion, sample_posterior=True)
    mean, deviation = diffusion.posterior(
        F.interpolate(image[None], (64, 64), mode="bilinear", align_corners=False)
    )
    assert torch.equal(build(diffusion).encode(image, "x"), mean)
    noise = torch.randn(mean.shape, generator=named_generator("x posterior", 4307))
    torch.testing.assert_close(model.encode(image, "x"), mean + deviation * noise)
    assert not torch.equal(noise[0], named_noise(["x"], mean.shape[1:], 4307)[0])
    for other in (
        model.encode(image, "y"),
        build(diffusion, sample_posterior=True, seed=1).encode(image, "x"),
    ):
        assert not torch.equal(other, model.encode(image, "x"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_in_half_precision_gives_nearly_the_same_maps_in_float32(
    model_folder, diffusion, image, dtype
):
    half = StableDiffusion(str(model_folder), dtype=dtype)
    half.unet.load_state_dict(diffusion.unet.state_dict())
    found = build(half).score_maps(image, "x", WORDS)
    assert found.dtype == torch.float32
    assert (found - build(diffusion).score_maps(image, "x", WORDS)).abs().mean() < 0.02


def test_maps_have_the_size_that_is_asked_for(diffusion, image):
    model = build(diffusion)
    found = model.score_maps(image, "x", WORDS, size=(70, 90))
    resized = F.interpolate(latent_maps(model, image)[None], (70, 90), mode="bilinear", align_corners=False)[
        0
    ]
    assert_maps(found, stretch(resized))


def test_without_classes_there_are_no_maps_and_no_call(diffusion, image):
    with Calls(unet=diffusion.unet, image=diffusion.vae.encoder) as calls:
        assert build(diffusion).score_maps(image, "x", []).shape == (0, 40, 52)
        assert build(diffusion).score_maps(image, "x", [], size=(7, 9)).shape == (0, 7, 9)
    assert not calls.count


@pytest.mark.slow
def test_compiled_layers_give_the_same_maps_and_are_left_at_the_same_place(model_folder, image):
    plain, compiled = (StableDiffusion(str(model_folder), compile=backend) for backend in (None, "eager"))
    ran = []
    compiled.unet.conv_out.register_forward_hook(lambda *_: ran.append(1))
    expected = latent_maps(build(plain), image)
    model = build(compiled)
    for _ in range(2):  # the second call runs what the first has compiled
        assert_maps(latent_maps(model, image), expected)
    assert not ran


def test_captions_that_are_not_one_for_each_class_are_an_error(diffusion, image):
    with pytest.raises(ValueError, match="shorter"):
        build(diffusion).score_maps(image, "x", WORDS, CAPTIONS[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (64, 72)}, r"multiples of 32, the stride of the diffusion model: found \[64, 72\]"),
        ({"size": (0, 64)}, r"found \[0, 64\]"),
        ({"timesteps": ()}, r"timesteps lie in 0\.\.999: found \[\]"),
        ({"timesteps": (100, 1000)}, r"found \[100, 1000\]"),
        ({"timesteps": (-1,)}, r"found \[-1\]"),
        (
            {"level_weights": (0.5, 0.5)},
            r"each of the 4 levels of the U-Net, not all 0: found \[0\.5, 0\.5\]",
        ),
        ({"level_weights": (0.2,) * 5}, r"found \[0\.2, 0\.2, 0\.2, 0\.2, 0\.2\]"),
        ({"level_weights": (0, 0, 0, 0)}, r"found \[0, 0, 0, 0\]"),
        ({"noises": 0}, "found noises 0"),
        ({"max_rows": 0}, "max_rows 0"),
        ({"self_power": -1}, "self_power -1"),
    ],
)
def test_an_option_out_of_range_is_an_error_that_shows_it(diffusion, options, message):
    with pytest.raises(ValueError, match=message):
        build(diffusion, **options)


TABLE = ClassTable("t", ("background", "car", "dog", "tree"), ((0, 0, 0),) * 4)


def test_a_label_map_has_the_class_of_the_highest_map_and_background_up_to_the_threshold():
    maps = torch.tensor([[[0.9, 0.5, 0.2, 0.6]], [[0.8, 0.4, 0.50001, 0.7]]])
    assert label_map(maps, [1, 3], TABLE, 0.5).tolist() == [[1, 0, 3, 3]]
    assert label_map(maps, [1, 3], TABLE, 0.65).tolist() == [[1, 0, 0, 3]]
    assert label_map(maps, [1, 3], TABLE, 1.0).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("threshold", [0.3, 0.45, 0.7])
def test_a_score_equal_to_the_threshold_is_background(threshold):
    maps = torch.full((1, 1, 2), threshold)
    maps[0, 0, 1] += 1e-6
    assert label_map(maps, [2], TABLE, threshold).tolist() == [[0, 2]]


def test_labels_are_candidates_or_background_and_below_threshold_one_each_image_shows_a_class(
    diffusion, image
):
    maps = build(diffusion).score_maps(image, "x", ["dog"])
    areas = []
    for threshold in (0.0, 0.3, 0.6, 0.9, 0.999):
        label = label_map(maps, [2], TABLE, threshold)
        assert label.dtype == torch.int64 and set(label.unique().tolist()) <= {0, 2}
        areas.append(int((label == 2).sum()))
    assert areas == sorted(areas, reverse=True) and areas[-1] >= 1 and areas[0] > areas[-1]


def test_a_table_without_background_has_a_class_everywhere():
    maps = torch.tensor([[[0.1, 0.0]], [[0.0, 0.2]]])
    assert label_map(maps, [0, 7], CITYSCAPES19, 0.9).tolist() == [[0, 7]]


def test_without_candidates_all_is_background_of_score_0_or_where_there_is_none_an_error():
    none = torch.zeros(0, 3, 4)
    score, label = best_class(none, [], TABLE)
    assert score.tolist() == [[0.0] * 4] * 3 and score.dtype == torch.float32
    assert label.tolist() == [[0] * 4] * 3 and label.dtype == torch.int64
    assert torch.equal(label_map(none, [], TABLE, 0.5), label)
    with pytest.raises(
        ValueError, match="no candidate class, and the class table 'cityscapes19' no background"
    ):
        label_map(none, [], CITYSCAPES19, 0.5)


def test_the_best_class_keeps_its_score_below_the_threshold_too():
    score, label = best_class(torch.tensor([[[0.9, 0.1]], [[0.8, 0.2]]]), [1, 3], TABLE)
    assert label.tolist() == [[1, 3]] and torch.equal(score, torch.tensor([[0.9, 0.2]]))
