"""How much memory a training step needs for its activations.

- On the CPU: the peak of what autograd keeps for the backward pass, that is the storages of saved tensors,
  each counted once while a graph holds it. This is exact and repeatable. Left out is what lives within one
  operation, and what gradient checkpointing saves in its own way.
- On CUDA: torch.cuda.max_memory_allocated over what was allocated before, so activations, gradients and all
  that is temporary.
"""

import weakref
from collections import Counter

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Saved:
    """What autograd holds instead of a tensor, so that its end can be noticed."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class ActivationMemory:
    """Measures what runs inside the block: afterwards `peak` has the bytes. Blocks do not nest.

    Args:
        module: whose parameters and buffers do not count; its device tells how to measure.
    """

    def __init__(self, module: nn.Module):
        own = [*module.parameters(), *module.buffers()]
        self.own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.cuda = own[0].is_cuda
        self.users: Counter[int] = Counter()  # saved tensors by the address of their storage
        self.held = self.peak = 0
        self.hooks = saved_tensors_hooks(self.pack, lambda saved: saved.tensor)

    def __enter__(self) -> "ActivationMemory":
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        else:
            self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self.cuda:
            self.peak = torch.cuda.max_memory_allocated() - self.held
        else:
            self.hooks.__exit__(*error)

    def pack(self, tensor: Tensor) -> Saved:
        """Count a tensor's storage until the graph lets go of what is returned."""
        # Detached, because an operation that saves its own result would else keep itself alive.
        saved, storage = Saved(tensor.detach()), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.own:
            self.held += 0 if self.users[place] else size
            self.users[place] += 1
            self.peak = max(self.peak, self.held)
            weakref.finalize(saved, self.release, place, size)
        return saved

    def release(self, place: int, size: int) -> None:
        self.users[place] -= 1
        self.held -= 0 if self.users[place] else size
