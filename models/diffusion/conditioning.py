"""What a U-Net is told beside the latent: text with emphasis, a learned prompt, a shifted time embedding."""

from collections.abc import Collection
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer


def token_positions(tokenizer: CLIPTokenizer, text: str, phrase: str) -> list[int]:
    """Positions of a phrase's tokens in the encoded text (begin of text is 0), found by token ids.

    The phrase's first occurrence counts; positions[-1] is its last sub-token.

    Raises:
        ValueError: the text does not hold the phrase as tokens of its own.
    """
    tokens, wanted = (tokenizer(words, add_special_tokens=False)["input_ids"] for words in (text, phrase))
    for start in range(len(tokens) - len(wanted) + 1):
        if wanted and tokens[start : start + len(wanted)] == wanted:
            return list(range(start + 1, start + 1 + len(wanted)))
    raise ValueError(
        f"The text {text!r} does not contain {phrase!r} as words of its own: write it into the text."
    )


def emphasize(embedding: Tensor, empty: Tensor, positions: Collection[int], weight: float) -> Tensor:
    """Move the embeddings of some tokens off those of the empty text: empty + weight (embedding - empty).

    Args:
        embedding, empty: encodings of the text and of "", [tokens, width].
        positions: those that move; the others keep their values, and weight 1 keeps all bit for bit.
        weight: 1.21 is what the notation `word++` of compel means.
    """
    if weight == 1:
        return embedding  # the formula would round
    positions = torch.as_tensor(sorted(positions), dtype=torch.long, device=embedding.device)
    moved = empty[positions] + weight * (embedding[positions] - empty[positions])
    return embedding.index_copy(0, positions, moved)


class LearnedConditioning(nn.Module):
    """MADM's learned prompt and time embedding, mixed into a constant text by gates (arXiv 2410.21708).

    Args:
        text: embedding U of the empty text, [1, tokens, width]; kept as a buffer.
        time_width: width of the output of the U-Net's time MLP.
    """

    def __init__(self, text: Tensor, time_width: int):
        super().__init__()
        self.register_buffer("text", text.detach().clone())
        self.prompt = nn.Parameter(nn.init.trunc_normal_(torch.empty_like(self.text), std=0.02))
        self.prompt_gate = nn.Parameter(torch.rand_like(self.text))
        self.text_gate = nn.Parameter(torch.rand_like(self.text))
        self.time = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, time_width), std=0.02))
        self.time_gate = nn.Parameter(
            torch.zeros(time_width)
        )  # closed at first: the U-Net starts as it was trained

    def forward(self) -> tuple[Tensor, Tensor]:
        """Context tanh(a_U) U + tanh(a_P) P, [1, tokens, width]; residual tanh(a_T) T, [1, time_width]."""
        context = self.text_gate.tanh() * self.text + self.prompt_gate.tanh() * self.prompt
        return context, self.time_gate.tanh() * self.time


@contextmanager
def add_time_residual(unet: nn.Module, residual: Tensor | None):
    """Inside the block the residual [1 or B, time width] is added to the output of the U-Net's time MLP."""
    if residual is None:
        yield
        return
    handle = unet.time_embedding.register_forward_hook(
        lambda module, inputs, output: output + residual.to(output.dtype)
    )
    try:
        yield
    finally:
        handle.remove()
