import torch
from torch import nn

from benchmarks.memory import ActivationMemory


def test_a_storage_counts_once_while_a_graph_holds_it_and_weights_do_not():
    layer, image = nn.Linear(100, 100), torch.randn(10, 100, requires_grad=True)
    with ActivationMemory(layer) as memory:
        found = layer(image).exp()  # keeps its input, 4000 bytes, the weight, and exp's result, 4000 bytes
        loss = (found[:5] * found[5:]).sum()
        assert memory.held == 8000
        other = found.tanh().sum()
        assert memory.held == 12000
        del other
        assert memory.held == 8000
        loss.backward()
        assert memory.held == 0
    assert memory.peak == 12000
