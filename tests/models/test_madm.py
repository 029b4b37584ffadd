from copy import deepcopy

import pytest
import torch
from torch import nn

from functional.losses import latent_regression, weighted_cross_entropy
from functional.noise import fixed_noise
from models.diffusion.stable_diffusion import StableDiffusion
from models.madm import MADM, Projection

PARTS = ("unet", "vae_encoder", "vae_decoder", "text_encoder")
NARROW = {"projection_channels": 32, "bottleneck_channels": 32, "embed_channels": 8, "channels": 8}


@pytest.fixture(scope="module")
def build(model_folder):
    original = StableDiffusion(str(model_folder), parts=PARTS)

    def build(**options):
        torch.manual_seed(0)
        return MADM(deepcopy(original), 5, **{**NARROW, "noise_size": (8, 8), "dropout": 0.0, **options})

    return build


@pytest.fixture
def image():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def label():
    return torch.randint(0, 5, (2, 32, 32), generator=torch.Generator().manual_seed(1))


def regression(output, label):
    target = torch.ones_like(output.latent)
    return latent_regression(output.latent, target, torch.ones(label.shape), factor=4)


def unet_inputs(network, monkeypatch):
    """List that each U-Net call extends by its arguments (latent, timestep, context)."""
    seen, original = [], network.diffusion.unet_arguments
    monkeypatch.setattr(
        network.diffusion, "unet_arguments", lambda *arguments: seen.append(arguments) or original(*arguments)
    )
    return seen


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (33, 70), (100, 31)])
@pytest.mark.parametrize("lplr", [True, False])
def test_logits_have_the_size_of_the_image_whatever_it_is(build, size, lplr):
    output = build(lplr=lplr).student(torch.rand(2, 3, *size))
    assert output.logits.shape == (2, 5, *size)
    if lplr:
        padded = [-(-side // 32) * 32 for side in size]
        assert output.latent.shape == (2, 4, padded[0] // 4, padded[1] // 4)
        assert output.decoded.shape == (2, 3, *size)
    else:
        assert output.latent is None and output.decoded is None


def test_padding_repeats_the_edge_and_is_cut_off_again(build):
    network, image = build().eval(), torch.rand(1, 3, 50, 40)
    padded = nn.functional.pad(image, (0, 24, 0, 14), mode="replicate")
    assert torch.equal(network(image), network(padded)[..., :50, :40])


def test_a_latent_that_is_known_already_gives_the_same_output(build, image):
    network = build()
    batch = network.encode(torch.cat([image, image.flip(3)]))
    for run in (network.student, network.teacher):
        torch.testing.assert_close(run(image, 3, latent=batch[:2]).logits, run(image, 3).logits)


def test_the_noise_is_a_fixed_buffer_that_survives_saving(build, image):
    network = build(noise_size=(64, 64)).eval()
    expected = torch.tensor([1.9269, 1.4873, 0.9007, -2.1055, 0.6784, -1.2345])
    torch.testing.assert_close(network.noise.flatten()[:6], expected, atol=5e-5, rtol=0)
    assert network.noise.shape == (1, 4, 64, 64)
    other = build(noise_size=(64, 64), noise_seed=7).eval()
    logits = network(image)
    assert torch.equal(network(image), logits) and not torch.equal(other(image), logits)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.noise, network.noise) and torch.equal(other(image), logits)
    assert not torch.equal(build().eval()(image), logits)  # noise drawn in the latent's size


def test_the_unet_gets_the_noised_latent_and_its_timestep(build, image, monkeypatch):
    network = build()
    seen, latent = unet_inputs(network, monkeypatch), network.encode(image)
    network.student(image)
    network.teacher(image, 60)
    noise = fixed_noise((8, 8))
    for (noised, timestep, _), t, signal, sigma in zip(
        seen, (0, 60), (0.999575, 0.969987), (0.029155, 0.243157), strict=True
    ):
        torch.testing.assert_close(noised, signal * latent + sigma * noise, atol=3e-6, rtol=0)
        assert noised.dtype == torch.float32 and timestep.tolist() == [t, t]
    assert not torch.equal(network.teacher(image, 60).logits, network.teacher(image, 0).logits)


def test_fresh_noise_differs_between_training_passes_and_images_but_not_in_evaluation(
    build, image, monkeypatch
):
    network = build(fresh_noise=True)
    seen = unet_inputs(network, monkeypatch)
    same = image[:1].expand(2, -1, -1, -1)
    latent = network.encode(same)
    network.student(same)
    network.teacher(same, 0)
    noises = [(noised - 0.999575 * latent) / 0.029155 for noised, _, _ in seen]
    assert all(noise.std().item() == pytest.approx(1, abs=0.1) for noise in noises)
    assert not torch.allclose(noises[0], noises[1], atol=0.1)
    assert not torch.allclose(noises[0][0], noises[0][1], atol=0.1)
    network.eval()
    assert torch.equal(network(image), network(image))


def test_the_conditioning_mixes_the_empty_text_with_a_prompt_and_adds_no_time_at_first(
    build, image, monkeypatch
):
    network = build()
    assert network.diffusion.text_encoder is None
    seen, own = unet_inputs(network, monkeypatch), network.adapter.conditioning
    text = network.diffusion.encode_text([""])
    output = network.student(image)
    expected = own.text_gate.tanh() * text + own.prompt_gate.tanh() * own.prompt
    assert torch.equal(seen[0][2], expected)
    assert own()[1].shape == (1, 128) and own()[1].abs().max() == 0
    output.logits.square().mean().backward()
    assert own.time_gate.grad.abs().max() > 0 and own.time.grad.abs().max() == 0
    with torch.no_grad():
        own.time_gate.fill_(1.0)
        own.time.fill_(1.0)
    assert not torch.allclose(network.student(image).logits, output.logits)


@pytest.mark.parametrize("train_output_layers", [False, True])
def test_exactly_what_is_trained_gets_gradients(build, image, label, train_output_layers):
    network = build(train_output_layers=train_output_layers)
    output = network.student(image)
    loss = weighted_cross_entropy(output.logits, label) + regression(output, label)
    loss.backward()
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in network.named_parameters() if p.grad is not None}
    unet = {f"diffusion.unet.{name}" for name, _ in network.diffusion.unet.named_parameters()}
    last = {name for name in unet if ".conv_norm_out." in name or ".conv_out." in name}
    own = {name for name, _ in network.named_parameters() if name.startswith("adapter.")}
    assert len(last) == 4 and trained == own | (unet if train_output_layers else unet - last)
    assert not any(p.requires_grad for p in network.diffusion.vae.parameters())


def test_the_regression_trains_the_unet_through_its_frozen_output_layers(build, image, label):
    network = build()
    regression(network.student(image), label).backward()
    unet = network.diffusion.unet
    assert unet.up_blocks[3].resnets[2].conv2.weight.grad.abs().max() > 0
    assert unet.conv_out.weight.grad is None
    assert all(p.grad is None for p in network.adapter.head.parameters())


def test_the_segmentation_loss_does_not_reach_the_regressed_latent(build, image, label, monkeypatch):
    network = build()

    def gradients():
        network.zero_grad()
        output = network.student(image)
        assert output.latent.requires_grad and not output.decoded.requires_grad
        weighted_cross_entropy(output.logits, label).backward()
        parameters = network.diffusion.unet.named_parameters()
        return output, {name: p.grad.clone() for name, p in parameters if p.grad is not None}

    output, expected = gradients()
    monkeypatch.setattr(network, "decode_latent", lambda latent: output.decoded.clone())
    _, constant = gradients()
    assert expected.keys() == constant.keys() and all(torch.equal(constant[k], expected[k]) for k in expected)
    monkeypatch.setattr(network, "decode_latent", lambda latent: torch.zeros_like(output.decoded))
    assert not torch.equal(network.student(image).logits, output.logits)  # the head reads it all the same


def test_the_decoded_regression_is_the_vae_image_in_its_own_range(build, image):
    network = build()
    latent = 3 * network.encode(image)
    expected = network.diffusion.vae.decode(latent / 0.18215).sample
    torch.testing.assert_close(network.decode_latent(latent), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("step", "alpha"), [(1, 0.5), (2, 2 / 3), (10, 0.909091), (998, 0.998999), (999, 0.999), (5000, 0.999)]
)
def test_the_teacher_moves_by_the_published_share(build, step, alpha):
    network = build()
    teacher, student = network.ema_adapter.head.classifier.bias, network.adapter.head.classifier.bias
    nn.init.zeros_(teacher)
    nn.init.ones_(student)
    network.update_teacher(step)
    torch.testing.assert_close(1 - teacher, torch.full((5,), alpha), atol=1e-6, rtol=0)
    nn.init.zeros_(teacher)
    network.update_teacher(step, max_alpha=0.6)
    torch.testing.assert_close(1 - teacher, torch.full((5,), min(alpha, 0.6)))


def test_the_teacher_is_a_running_mean_at_first_and_does_not_move_before_the_first_step(build):
    network = build()
    for teacher, student in zip(
        network.ema_adapter.parameters(), network.adapter.parameters(), strict=True
    ):  # all of conditioning, projections and head
        nn.init.zeros_(teacher)
        nn.init.constant_(student, 3.0)
    for step, expected in enumerate((0.0, 1.5, 2.0)):
        network.update_teacher(step)
        for teacher in network.ema_adapter.parameters():
            torch.testing.assert_close(teacher, torch.full_like(teacher, expected))


@pytest.mark.parametrize("ema_unet", [False, True])
def test_the_teacher_starts_as_the_student_and_shares_its_unet_unless_it_has_its_own(
    build, image, label, ema_unet
):
    network = build(ema_unet=ema_unet)
    assert torch.equal(network.teacher(image, 0).logits, network.student(image).logits)
    teacher = network.teacher_parameters()
    assert not any(p.requires_grad for p in teacher.values())
    assert {name.split(".")[0] for name in teacher} == (
        {"ema_adapter", "ema_unet"} if ema_unet else {"ema_adapter"}
    )
    before = network.teacher(image, 0).logits

    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    output = network.student(image)
    (weighted_cross_entropy(output.logits, label) + regression(output, label)).backward()
    optimizer.step()
    after = network.teacher(image, 0)
    assert torch.equal(after.logits, before) == ema_unet and not after.logits.requires_grad
    network.update_teacher(1)
    own, average = network.adapter.state_dict(), network.ema_adapter.state_dict()
    for name in ("conditioning.prompt", "projections.0.conv2.0.weight", "head.classifier.weight"):
        assert not torch.equal(own[name], average[name])
    if ema_unet:
        old = build().diffusion.unet
        live, average = network.diffusion.unet, network.ema_unet
        expected = (old.conv_in.weight + live.conv_in.weight) / 2
        torch.testing.assert_close(average.conv_in.weight, expected)
        assert torch.equal(average.conv_out.weight, live.conv_out.weight)
    else:
        assert network.ema_unet is None


def test_the_teacher_normalises_by_its_batch_and_no_buffer_moves(build, image):
    network = build()
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    logits = network.teacher(image, 0).logits
    assert not torch.equal(network.teacher(image[:1], 0).logits, logits[:1])
    network.eval()
    assert torch.equal(network.teacher(image, 0).logits, logits)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())
    assert not any("ema_" in name and "running" in name for name in buffers)
    network(image)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())
    network.train().student(image)
    moved = {name for name, buffer in network.named_buffers() if not torch.equal(buffer, buffers[name])}
    assert moved == {name for name in buffers if name.startswith("adapter.head") and "." in name}


def test_dropout_in_the_teacher_is_an_option_of_training(build, image):
    def repeats(network):
        return torch.equal(network.teacher(image, 0).logits, network.teacher(image, 0).logits)

    assert repeats(build(dropout=0.5)) and not repeats(build(dropout=0.5, teacher_dropout=True))
    assert repeats(build(dropout=0.5, teacher_dropout=True).eval())
    network = build(dropout=0.5)
    assert not torch.equal(network.student(image).logits, network.student(image).logits)


def test_without_lplr_the_head_takes_the_vae_encoders_feature(build, image, label):
    network = build(lplr=False)
    feature = network.encode_with_feature(image, None)[1]
    assert feature.shape == (2, 16, 16, 16)  # of the level above the latent's 8 x 8
    assert torch.equal(network.encode_with_feature(image, None)[0], network.encode(image))
    assert network.adapter.projections[0].conv3[0].out_channels == 32
    weighted_cross_entropy(network.student(image).logits, label).backward()
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in network.named_parameters() if p.grad is not None}
    with pytest.raises(ValueError, match="Without LPLR"):
        network.student(image, latent=network.encode(image))


def test_what_cannot_be_built_is_refused(build, model_folder):
    with pytest.raises(ValueError, match="vae_decoder is not loaded"):
        MADM(StableDiffusion(str(model_folder)), 5)
    MADM(StableDiffusion(str(model_folder)), 5, lplr=False, **NARROW)
    with pytest.raises(ValueError, match="train_output_layers"):
        build(lplr=False, train_output_layers=True)
    with pytest.raises(ValueError, match="float32"):
        MADM(StableDiffusion(str(model_folder), parts=PARTS, dtype="bfloat16"), 5)
    for option, width, advice in (("projection_channels", 48, 64), ("bottleneck_channels", 0, 32)):
        with pytest.raises(
            ValueError, match=rf"{option} must be.*found {width}\. Set .*{option} to {advice}"
        ):
            build(**{option: width})


def test_checkpointing_recomputes_the_head_with_equal_gradients_and_statistics(build, image, label):
    results = []
    for checkpointing in (False, True):
        network, calls = build(gradient_checkpointing=checkpointing, dropout=0.3), []
        network.adapter.register_forward_hook(lambda *call, calls=calls: calls.append(1))
        assert network.diffusion.unet.is_gradient_checkpointing == checkpointing
        torch.manual_seed(0)
        output = network.student(image)
        (weighted_cross_entropy(output.logits, label) + regression(output, label)).backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        results.append((gradients, dict(network.named_buffers())))
    (gradients, buffers), (again, buffers_again) = results
    torch.testing.assert_close(again, gradients)
    assert all(torch.equal(buffers_again[name], buffer) for name, buffer in buffers.items())
    assert buffers["adapter.head.fuse.1.num_batches_tracked"] == 1


def test_checkpointing_stores_less_for_the_backward_pass(build, image):
    def stored(network):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network.student(image)
        return total

    assert stored(build(gradient_checkpointing=True)) < 0.5 * stored(build())


def test_mixed_precision_keeps_the_gradients_whatever_the_teacher_did_before(build, image, label):
    network = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network.teacher(image, 5)
        output = network.student(image)
        loss = weighted_cross_entropy(output.logits, label) + regression(output, label)
    assert output.latent.dtype == torch.float32
    loss.backward()
    trained = [p for p in network.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert network.diffusion.unet.conv_in.weight.grad.abs().max() > 0


def test_published_projections_have_the_published_number_of_parameters():
    widths = {
        (3, 128): 165_632,
        (320, 512): 420_352,
        (640, 512): 625_152,
        (1280, 512): 1_034_752,
        (512, 512): 280_064,
    }
    with torch.device("meta"):
        for (before, after), count in widths.items():
            assert sum(p.numel() for p in Projection(before, 128, after).parameters()) == count


def test_a_projection_keeps_the_size_and_starts_kaiming_normal():
    torch.manual_seed(0)
    projection = Projection(64, 64, 32)
    assert projection(torch.randn(2, 64, 5, 7)).shape == (2, 32, 5, 7)
    convs = [m for m in projection.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.bias is None for conv in convs)
    assert projection.conv2[0].weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)
    assert isinstance(Projection(32, 32, 32).shortcut, nn.Identity)


@pytest.mark.cuda
def test_a_step_does_not_wait_for_the_device(build, image, label):
    network, image, label = build().cuda(), image.cuda(), label.cuda()
    for mode in ("default", "error"):  # the first pass sets up libraries
        torch.cuda.set_sync_debug_mode(mode)
        try:
            network.update_teacher(1)
            output = network.student(image)
            weighted_cross_entropy(output.logits, label).backward()
            network.teacher(image, 5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
