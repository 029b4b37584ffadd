"""DIFF's features against the plain order of benchmarks/, its path, its prompts, its savings."""

from contextlib import nullcontext

import pytest
import torch

from benchmarks.plain_diff import plain_branches
from benchmarks.random_models import random_model
from models.diff import CITYSCAPES_PROMPTS, DIFF, DIFFBackbone, FeatureBuffer
from models.diffusion.inversion import PATHS, InversionPath
from tests.tiny_diff import images, labels, noise_of, tiny_backbone, tiny_diff
from tests.tiny_model import write_tiny_model

CAR, PERSON, SKY = 8, 3, 0
SHORT = InversionPath(targets=(11, 40, 80), saved=(2, 1))  # eta is 0, 1, 1; every step matters


def features(backbone, image, label=None, draw=None):
    """{(block, layer, position): feature of all views} and the latents that the U-Net saw."""
    kept, seen = {}, []

    def keep(block, layer, step, feature):
        kept[block, layer, step] = feature.clone()

    handle = backbone.diffusion.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    backbone.extract(image, backbone.views(len(image), label), draw or noise_of(0), keep)
    handle.remove()
    return kept, seen


@pytest.fixture
def backbone(model_folder):
    return lambda **options: tiny_backbone(model_folder, **options)


# --- equal to the released order


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 5},
        {"steps": 1},
        {"steps": SHORT, "prompt": "a photo of a road", "guidance": 3.0},
        {"steps": SHORT, "ca_reduce": "mean", "prediction": "scheduler"},
        {"steps": SHORT, "aggregation": "softmax", "eta": 0.0},
        {"steps": SHORT, "prompt": "a road", "negative_prompt": "a road"},
        {"steps": SHORT, "negative_prompt": "a photo of a road", "guidance": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("classes", [(CAR,), (CAR, CAR), (SKY,)], ids=str)
def test_both_branches_equal_the_plain_order_of_the_released_code(model_folder, options, classes):
    network, label = tiny_diff(model_folder, **options), labels(*classes)
    image = images(len(classes))
    for found, plain in zip(
        network.branches(image, label, noise_of(1)),
        plain_branches(network, image, label, noise_of(1)),
        strict=True,
    ):
        torch.testing.assert_close(found, plain, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"ca_reduce": "mean"}, {"prompt": "a photo of a road"}], ids=str)
def test_images_of_different_classes_in_a_batch_equal_the_plain_order_one_by_one(model_folder, options):
    network = tiny_diff(model_folder, steps=SHORT, **options).eval()
    label, image, draw = labels(CAR, SKY, PERSON), images(3), noise_of(1)
    found = network.branches(image, label, draw)
    rows = {0: [0, 3, 6], 1: [1, 4], 2: [2, 5, 7]}  # of each image: unconditional, conditional, its class
    for i, own in rows.items():
        one = slice(i, i + 1)
        plain = plain_branches(
            network, image[one], label[one], lambda step, count, own=own: draw(step, 8)[own[:count]]
        )
        for ours, theirs in zip(found, plain, strict=True):
            torch.testing.assert_close(ours[one], theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_half_precision_equals_the_plain_order_in_it(model_folder, device):
    network = tiny_diff(model_folder, steps=SHORT, dtype="float16").to(device)
    image, label = images(1).to(device), labels(CAR).to(device)

    def draw(step, count):
        return noise_of(1)(step, count).to(device)

    found, plain = network.branches(image, label, draw), plain_branches(network, image, label, draw)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-2)


def test_both_branches_take_one_call_of_the_autoencoder_and_one_of_the_unet_a_step(backbone):
    module, rows, encoded, recorded = backbone(steps=37), [], [], []
    unet, tapped = module.diffusion.unet, module.diffusion.unet.up_blocks[3].resnets[0].conv2
    unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    unet.conv_in.register_forward_pre_hook(lambda *_: recorded.append(bool(tapped._forward_hooks)))
    module.diffusion.vae.encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    with torch.no_grad():
        module.branches(images(1), labels(CAR))
    assert rows == [3] * 34 and encoded == [1]  # the image, its copy, and that with the class's prompt
    assert [step for step, hooked in enumerate(recorded) if hooked] == sorted(PATHS[37].saved)
    assert module.diffusion.text_encoder is None


def test_the_path_of_37_steps_equals_the_plain_order_with_a_velocity_model(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("v"), prediction_type="v_prediction")
    found = {}
    for prediction in ("raw", "scheduler"):
        network = tiny_diff(folder, steps=37, prediction=prediction)
        found[prediction] = network.branches(images(1), labels(PERSON), noise_of(2))
        plain = plain_branches(network, images(1), labels(PERSON), noise_of(2))
        for ours, theirs in zip(found[prediction], plain, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found["raw"][1], found["scheduler"][1], atol=1e-4)


def test_accumulated_features_give_the_pyramid_of_the_buffered_ones(backbone):
    for aggregation in ("concatenation", "softmax"):
        module = backbone(aggregation=aggregation).eval()
        buffered = module(images(), ["a", "b"])
        with torch.no_grad():
            accumulated = module(images(), ["a", "b"])
        for a, b in zip(buffered, accumulated, strict=True):
            torch.testing.assert_close(a.detach(), b, atol=2e-5, rtol=1e-4)


def test_at_inference_no_buffer_of_features_is_built(backbone, monkeypatch):
    monkeypatch.setattr(FeatureBuffer, "keep", None)
    with torch.no_grad():
        backbone()(images())
    with pytest.raises(TypeError):
        backbone()(images())


# --- the path


def test_the_unet_is_called_at_the_published_times_and_not_after_the_last_saved_step(backbone, monkeypatch):
    module, times = backbone(steps=37), []
    handle = module.diffusion.unet.time_proj.register_forward_pre_hook(
        lambda _, inputs: times.append((int(inputs[0][0]), len(inputs[0])))
    )
    with torch.no_grad():
        module(images())
    handle.remove()
    assert times == [(t, 2) for t in PATHS[37].sources[:34]]


def test_a_unet_of_zeros_without_eta_scales_the_latent_whatever_the_labels(backbone):
    path = InversionPath(targets=PATHS[37].targets, saved=(34,))  # the last call is at t = 105
    module = backbone(steps=path, eta=0.0)
    for parameter in module.diffusion.unet.conv_out.parameters():
        parameter.zero_()
    for label in (labels(CAR, PERSON), labels(SKY, SKY), None):
        _, seen = features(module, images(), label)
        torch.testing.assert_close(seen[-1], 0.9427237 * seen[0], rtol=1e-5, atol=1e-6)


def test_features_before_step_11_do_not_depend_on_the_noise_and_later_ones_do(backbone):
    module = backbone(steps=37)
    posterior = noise_of(0)

    def other(step, count):
        return posterior(step, count) if step < 0 else noise_of(1)(step, count)

    first, again, second = (
        features(module, images(1), draw=draw)[0] for draw in (posterior, posterior, other)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    same = {step: torch.equal(first[3, 0, step], second[3, 0, step]) for step in range(9)}
    assert same == {step: PATHS[37].saved[step] in (3, 7, 11) for step in range(9)}


def test_without_eta_nothing_is_drawn_but_the_sample_of_the_posterior(backbone):
    steps = []

    def draw(step, count):
        steps.append(step)
        return noise_of(0)(step, count)

    features(backbone(eta=0.0), images(), draw=draw)
    assert steps == [-1]


# --- prompts


def test_equal_prompts_make_the_guidance_an_identity_and_different_ones_do_not(backbone):
    def last(**options):
        kept, _ = features(backbone(steps=SHORT, **options), images(1))
        return kept[3, 5, 0]

    assert torch.equal(last(guidance=1.0), last(guidance=20.0))
    different = [last(guidance=w, prompt="a photo of a road") for w in (1.0, 20.0)]
    assert not torch.allclose(*different, atol=1e-4)
    # Without guidance, w = 0, only the negative prompt moves the latent; its ca copies still differ.
    assert not torch.allclose(last(guidance=0.0, prompt="a photo of a road"), last(), atol=1e-4)


def test_a_prompt_moves_the_latent_inside_its_mask_only_and_there_by_the_mean(backbone, monkeypatch):
    module = backbone(
        steps=InversionPath(targets=(40, 80), saved=(1,)), eta=0.0, prompts={"car": "a red car"}
    )
    output, seen = (0.3, -0.5), []  # noise of the negative prompt and of the car's

    def call(step, latent, context, stop):
        seen.append(latent)
        noise = [output[int(torch.equal(text, module.contexts[1]))] for text in context]
        return torch.tensor(noise).view(-1, 1, 1, 1).expand_as(latent), {}

    monkeypatch.setattr(module, "call", call)
    label = labels(CAR)
    label[0, :, :4] = 255  # the first column of cells is ignored
    features(module, images(1), label)
    alpha_t, alpha_s = module.diffusion.alpha_bars[[0, 40]]

    def moved(latent, noise):
        clean = (latent.double() - (1 - alpha_t).sqrt() * noise) / alpha_t.sqrt()
        return (alpha_s.sqrt() * clean + (1 - alpha_s).sqrt() * noise).float()

    plain, steered, copy = seen[0]
    assert torch.equal(steered, copy) and not torch.equal(plain, steered)  # samples of their own
    torch.testing.assert_close(seen[1][0], moved(plain, output[0]))
    neutral, guided = (
        moved(steered, noise) for noise in (output[0], output[0] + 5.0 * (output[1] - output[0]))
    )
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[:, 1:4] = True
    torch.testing.assert_close(seen[1][1], torch.where(inside, (neutral + guided) / 2, neutral))


def test_masks_take_the_first_pixel_of_each_cell_and_ignored_pixels_none(backbone):
    label = torch.full((1, 32, 32), 5)
    label[0, 8, 4], label[0, 13, 13], label[0, 0, 0] = CAR, CAR, 255
    views = backbone().views(1, label)
    assert views.steered == [(1, 1)] and views.masks.nonzero().tolist() == [[0, 0, 2, 1]]


def test_a_class_steers_only_the_images_that_show_it(backbone):
    views = backbone().views(3, labels(CAR, SKY, PERSON))
    assert views.image == [0, 1, 2, 0, 1, 2] and views.conditional == [3, 4, 5]
    assert views.steered == [(3, 1), (5, 0)]


def test_a_class_too_small_for_a_mask_adds_its_copy_all_the_same(backbone):
    label = torch.full((1, 32, 32), 5)
    label[0, 1, 1] = CAR
    views = backbone().views(1, label)
    assert views.steered == [(1, 1)] and not views.masks.any()


def test_without_a_prompted_class_both_branches_are_alike_under_equal_noise(backbone):
    module = backbone()
    draw = noise_of(3)
    kept, _ = features(
        module, images(1), labels(SKY), lambda step, count: draw(step, 1).repeat(count, 1, 1, 1)
    )
    for feature in kept.values():
        torch.testing.assert_close(feature[0], feature[1])


def test_prompts_are_those_of_the_mapping(backbone):
    label = labels(CAR)
    one, other, none = (
        features(backbone(prompts=prompts), images(1), label)[0][3, 5, 0]
        for prompts in ({"car": "a red car"}, {"car": "a blue car"}, {})
    )
    assert not torch.equal(one[1], other[1]) and not torch.equal(one[1], none[1])
    assert torch.equal(one[0], other[0])  # the unconditional branch knows none


def test_the_default_prompts_are_those_of_the_released_code():
    assert list(CITYSCAPES_PROMPTS) == ["sidewalk", "wall", "rider", "truck", "train"]
    assert CITYSCAPES_PROMPTS["truck"].endswith("; truck, Larger vehicles used for cargo transport")
    assert all(text.startswith("A high quality photo; europe city; ") for text in CITYSCAPES_PROMPTS.values())


# --- taps


def test_copies_with_identical_texts_multiply_ca_and_leave_res(model_folder):
    same = {"car": "", "person": ""}
    module = tiny_backbone(model_folder, prompts=same, steps=1)
    label = labels(CAR)
    label[0, :, 16:] = PERSON
    kept, _ = features(module, images(1), label, lambda step, count: torch.zeros(count, 4, 8, 8))
    single = module.diffusion.features(
        module.diffusion.encode(images(1)), 0, module.contexts[:1], list(module.places)
    )
    for tap, feature in zip(module.places, single, strict=True):
        found = kept[(*module.places[tap], 0)]
        copies = (2, 4) if tap.startswith("ca") else (1, 1)
        torch.testing.assert_close(found[0], copies[0] * feature[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], copies[1] * feature[0], rtol=1e-4, atol=1e-5)
    mean = tiny_backbone(model_folder, prompts=same, steps=1, ca_reduce="mean")
    kept, _ = features(mean, images(1), label, lambda step, count: torch.zeros(count, 4, 8, 8))
    torch.testing.assert_close(kept[3, 5, 0][1], kept[3, 5, 0][0], rtol=1e-4, atol=1e-5)


def test_there_are_nine_res_and_nine_ca_taps_and_none_of_the_deepest_block(backbone):
    module = backbone()
    assert [len(taps) for taps in module.taps.values()] == [6, 6, 6] and list(module.taps) == [1, 2, 3]
    assert module.taps[1] == ["res.1.0", "res.1.1", "res.1.2", "ca.1.0", "ca.1.1", "ca.1.2"]


def test_features_are_concatenated_by_layer_then_by_saved_step():
    buffer = FeatureBuffer({1: ["res", "ca"]}, steps=3)
    for step in range(3):
        for layer in range(2):
            buffer.keep(1, layer, step, torch.full((2, 4, 5, 6), 10.0 * layer + step))
    found = buffer.concatenated(1)
    assert found.shape == (2, 24, 5, 6)
    assert found[0, ::4, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]


# --- noise


def test_an_images_noise_in_evaluation_depends_on_its_name_and_the_seed_only(model_folder):
    network = tiny_diff(model_folder).eval()
    with torch.no_grad():
        both = network(images(), ["x", "y"])
        torch.testing.assert_close(network(images()[1:], ["y"]), both[1:], atol=1e-5, rtol=1e-4)
        assert torch.equal(network(images(), ["x", "y"]), both)
        assert not torch.allclose(network(images(), ["y", "x"]), both, atol=1e-4)
        assert not torch.allclose(
            tiny_diff(model_folder, eval_seed=1).eval()(images(), ["x", "y"]), both, atol=1e-4
        )
        free = tiny_diff(model_folder, eval_seed=None).eval()
        assert not torch.equal(free(images(), ["x", "y"]), free(images(), ["x", "y"]))


def test_noise_in_training_is_drawn_freely(model_folder):
    network = tiny_diff(model_folder).train()
    torch.manual_seed(0)
    first = network(images(), ["x", "y"])
    assert not torch.equal(first, network(images(), ["x", "y"]))
    torch.manual_seed(0)
    assert torch.equal(first, network(images(), ["x", "y"]))


def test_shared_noise_makes_one_view_of_both_branches_where_no_class_is_prompted(model_folder):
    module = tiny_backbone(model_folder, share_noise=True)
    views = module.views(3, labels(SKY, CAR, SKY))
    assert views.image == [0, 1, 2, 1] and views.conditional == [0, 3, 2] and views.steered == [(3, 1)]
    conditional, unconditional = module.branches(images(3), labels(SKY, CAR, SKY), noise_of(0))
    for c, u in zip(conditional, unconditional, strict=True):
        assert torch.equal(c[0], u[0]) and torch.equal(c[2], u[2]) and not torch.allclose(c[1], u[1])


def test_shared_noise_is_the_same_in_both_branches(model_folder):
    module = tiny_backbone(model_folder, share_noise=True, prompts={"car": ""})
    label = labels(CAR)
    label[0, :, :16:4] = SKY  # the class is there, but in the first pixel of no cell: its row moves nothing
    kept, _ = features(module, images(1), label, noise_of(0))
    torch.testing.assert_close(kept[3, 0, 0][0], kept[3, 0, 0][1], atol=1e-5, rtol=1e-4)
    apart = tiny_backbone(model_folder, prompts={"car": ""})
    kept, _ = features(apart, images(1), label, noise_of(0))
    assert not torch.allclose(kept[3, 0, 0][0], kept[3, 0, 0][1], atol=1e-2)


# --- sizes and errors


@pytest.mark.parametrize("size", [(33, 70), (1, 1), pytest.param((540, 960), marks=pytest.mark.slow)])
def test_logits_have_the_size_of_the_image_whatever_it_is(model_folder, size):
    network = tiny_diff(model_folder, steps=1).eval()
    with torch.no_grad():
        assert network(images(1, size)).shape == (1, 11, *size)


def test_a_crop_off_the_stride_trains_with_its_padding_ignored(model_folder):
    network = tiny_diff(model_folder, steps=1)
    image, label = images(1, (40, 50)), labels(CAR, size=(40, 50))
    conditional, unconditional = network.branches(image, label)
    assert conditional.shape == unconditional.shape == (1, 11, 32, 32)
    assert network.backbone.diffusion.unpad(conditional, image).shape == (1, 11, 40, 50)


@pytest.fixture(scope="module")
def full_size():
    """Build DIFF on one Stable Diffusion 2.1 without memory."""
    diffusion = random_model("sd-2.1", "meta", ["", *CITYSCAPES_PROMPTS.values()])

    def build(steps):
        with torch.device("meta"):
            return DIFF(DIFFBackbone(diffusion, "cityscapes19", steps), 19).to("meta")

    return build


def test_the_trained_parameters_on_stable_diffusion_21_are_the_published_ones(full_size):
    def count(module):
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    totals = {steps: count(full_size(steps)) for steps in (37, 5, 1)}
    assert totals == {37: 309_999_635, 5: 206_780_435, 1: 103_561_235}
    network = full_size(37)
    assert [count(part) for part in network.backbone.aggregations] == [180_365_312, 45_093_888, 11_274_752]
    assert count(network.backbone.finecoder) == 68_832_512 and count(network.head) == 4_433_171
    assert sum(p.numel() for p in network.backbone.diffusion.unet.parameters()) == 865_910_724


@pytest.mark.parametrize("size", [(512, 512), (512, 1024)])
def test_features_on_stable_diffusion_21_have_the_published_shapes(full_size, monkeypatch, size):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know meta tensors
    network = full_size(1).eval()
    backbone, (height, width) = network.backbone, size
    kept, image = {}, torch.empty(1, 3, *size, device="meta")
    with torch.no_grad():
        backbone.extract(
            image,
            backbone.views(1),
            backbone.draw_freely(image),
            lambda block, layer, step, feature: kept.update({(block, layer): tuple(feature.shape)}),
        )
        levels = backbone(image)
        logits = network.head(levels)
    assert kept == {
        (block, layer): (1, channels, height // stride, width // stride)
        for block, channels, stride in ((1, 1280, 32), (2, 640, 16), (3, 320, 8))
        for layer in range(6)
    }
    wanted = [(c, height // s, width // s) for c, s in ((256, 4), (512, 8), (1024, 16), (2048, 32))]
    assert [tuple(level.shape[1:]) for level in levels] == wanted
    assert logits.shape == (1, 19, height // 4, width // 4)


@pytest.mark.parametrize("aggregation", ["concatenation", "softmax"])
def test_gradients_reach_the_fusion_and_the_head_alone(model_folder, aggregation):
    network = tiny_diff(model_folder, steps=SHORT, aggregation=aggregation)
    torch.stack(
        [logits.square().mean() for logits in network.branches(images(1), labels(CAR))]
    ).sum().backward()
    learned = {
        name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    wanted = {name for name, p in network.named_parameters() if p.requires_grad}
    assert learned == wanted and not any("diffusion" in name for name in wanted)
    assert not any(module.training for module in network.backbone.diffusion.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 7}, "no path of 7 steps: set steps to 37, 5, 1"),
        ({"prompts": {"cat": "a cat"}}, "found 'cat'"),
        ({"prediction": "v"}, "raw"),
        ({"ca_reduce": "max"}, "sum"),
        ({"aggregation": "mean"}, "softmax"),
        ({"channels": (100, 64, 64, 32)}, "multiples of 64"),
        ({"channels": (128, 64, 64)}, "four"),
        ({"steps": {"targets": (20, 10), "saved": (0,)}}, "ascending targets"),
        ({"steps": {"targets": (10, 20), "saved": (0, 2)}}, r"saved \[0, 2\]"),
        ({"steps": {"targets": (10, 20), "saved": (1, 1)}}, "different positions"),
    ],
)
def test_wrong_options_are_errors_that_name_the_right_ones(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        steps = options.get("steps", 5)
        backbone(**options | {"steps": InversionPath(**steps) if isinstance(steps, dict) else steps})


def test_the_backbone_names_the_stride_that_sizes_must_have_and_wants_a_name_per_image(backbone):
    with pytest.raises(ValueError, match=r"multiples of 32: found \[40, 32\]"):
        backbone()(images(1, (40, 32)))
    with pytest.raises(ValueError, match="found 1 names for 2 images"):
        backbone()(images(), ["a"])
