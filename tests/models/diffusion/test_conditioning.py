import pytest
import torch

from models.diffusion.conditioning import (
    LearnedConditioning,
    add_time_residual,
    emphasize,
    token_positions,
)
from models.diffusion.stable_diffusion import StableDiffusion
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def diffusion(model_folder):
    return StableDiffusion(str(model_folder))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Each of these words is one token, as in CLIP's vocabulary; others fall into pieces."""
    words = ("a", "photograph", "photography", "of", "plane", "flying", "hot", "dog", "traffic", "light")
    folder = write_tiny_model(tmp_path_factory.mktemp("words"), words=words)
    return StableDiffusion(str(folder), parts=("text_encoder",)).tokenizer


def test_positions_of_a_name_are_found_by_its_tokens(tokenizer):
    assert token_positions(tokenizer, "a photograph of plane flying", "plane") == [4]
    assert token_positions(tokenizer, "a photograph of plane flying", "flying") == [5]
    assert token_positions(tokenizer, "a photography of traffic light", "traffic light") == [4, 5]
    assert token_positions(tokenizer, "a photograph of Plane", "plane") == [4]  # CLIP is lower case
    pieces = token_positions(tokenizer, "a photography of zebra", "zebra")  # no word of the vocabulary
    assert pieces == list(range(4, 4 + len(pieces))) and len(pieces) > 1


@pytest.mark.parametrize("phrase", ["planes", "light traffic", ""])
def test_a_name_that_the_text_does_not_contain_is_an_error_that_names_both(tokenizer, phrase):
    with pytest.raises(ValueError, match=repr(phrase)):
        token_positions(tokenizer, "a photograph of plane, traffic light", phrase)


def test_emphasis_moves_only_the_named_tokens_by_the_weight(diffusion):
    text = "a photo of hot dog"
    embedding, empty = diffusion.encode_text([text, ""])
    last_word = token_positions(diffusion.tokenizer, text, "hot dog")[-1:]
    moved = emphasize(embedding, empty, last_word, 1.21)
    assert last_word == [5]
    torch.testing.assert_close(moved[5] - empty[5], 1.21 * (embedding[5] - empty[5]))
    others = [i for i in range(16) if i != 5]
    assert torch.equal(moved[others], embedding[others]) and not torch.equal(moved[5], embedding[5])


def test_emphasis_of_weight_one_is_the_plain_encoding_bit_for_bit(diffusion):
    embedding, empty = diffusion.encode_text(["a photo of dog", ""])
    assert torch.equal(emphasize(embedding, empty, [4], 1.0), embedding)


@pytest.fixture
def conditioning(diffusion):
    torch.manual_seed(0)
    return LearnedConditioning(diffusion.encode_text([""]), time_width=128)


def test_at_the_start_the_time_residual_is_zero_and_the_context_mixes_prompt_and_text(
    diffusion, conditioning
):
    context, residual = conditioning()
    assert residual.shape == (1, 128) and residual.abs().max() == 0
    text = diffusion.encode_text([""])
    expected = conditioning.text_gate.tanh() * text + conditioning.prompt_gate.tanh() * conditioning.prompt
    assert torch.equal(context, expected)
    assert conditioning.prompt_gate.min() >= 0 and conditioning.prompt_gate.max() < 1
    assert 0.015 < conditioning.prompt.std() < 0.025
    with torch.no_grad():
        conditioning.prompt_gate.zero_()
        conditioning.text_gate.fill_(20)
    torch.testing.assert_close(conditioning()[0], text)


def test_at_the_start_the_gate_of_the_time_embedding_learns_and_the_embedding_does_not(
    diffusion, conditioning
):
    context, residual = conditioning()
    diffusion.predict(torch.randn(2, 4, 8, 8), 0, context, time_residual=residual).square().mean().backward()
    assert conditioning.time_gate.grad.abs().max() > 0
    assert conditioning.time.grad.abs().max() == 0
    for name in ("prompt", "prompt_gate", "text_gate"):
        assert getattr(conditioning, name).grad.abs().max() > 0


def test_the_learned_conditioning_of_sd_1_has_the_published_number_of_parameters():
    conditioning = LearnedConditioning(torch.zeros(1, 77, 768), time_width=1280)
    assert sum(p.numel() for p in conditioning.parameters()) == 179_968
    assert "text" in conditioning.state_dict()


def test_the_time_residual_is_added_to_the_output_of_the_time_mlp_and_removed_afterwards(diffusion):
    unet, latent, context = diffusion.unet, torch.randn(2, 4, 8, 8), diffusion.encode_text([""])
    residual = torch.randn(1, 128)
    seen = []

    def look(module, inputs):
        seen.append(inputs[1])  # the time embedding that the first resnet gets

    handle = unet.down_blocks[0].resnets[0].register_forward_pre_hook(look)
    plain = diffusion.predict(latent, 7, context)
    zero = diffusion.predict(latent, 7, context, time_residual=torch.zeros(1, 128))
    shifted = diffusion.predict(latent, 7, context, time_residual=residual)
    with pytest.raises(RuntimeError, match="mine"), add_time_residual(unet, residual):
        raise RuntimeError("mine")
    again = diffusion.predict(latent, 7, context)
    handle.remove()
    torch.testing.assert_close(seen[2], seen[0] + residual)
    assert torch.equal(plain, zero) and torch.equal(plain, again) and not torch.equal(plain, shifted)


def test_the_time_residual_reaches_tapped_features(diffusion):
    latent, context = torch.randn(1, 4, 8, 8), diffusion.encode_text([""])
    plain, shifted = (
        diffusion.features(latent, 7, context, (5,), time_residual=residual)[0]
        for residual in (None, torch.ones(1, 128))
    )
    assert not torch.equal(plain, shifted)
