"""The order in which training draws its samples: a function of the step, so that a run can be resumed."""

from collections import deque
from collections.abc import Iterator

import numpy as np

REMEMBERED = 64  # batches; workers prepare two each ahead of their use


def sample_seed(seed: int, draw: int) -> int:
    """Seed (32 bits) of all that is random about one drawn sample: a hash of the run's seed and the draw."""
    return int(np.random.SeedSequence([seed, 1, draw]).generate_state(1)[0])


class StepBatchSampler:
    """Batches of (index, draw), without an end.

    `draw` counts the samples that all ranks together have drawn since the start of the run; step s takes the
    draws s * world_size * batch_size and following, and each rank a disjoint slice of them. A pass over the
    data is `length` draws in a random order of its own (seeded by the run's seed and the number of the pass),
    so the ids in a batch depend on (seed, step, rank, world_size) only, and starting later iterates nothing.

    Attributes:
        asked: step and ids of the last batches that were asked for, oldest first, for messages.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
    ):
        if length < 1 or batch_size < 1:
            raise ValueError(
                f"Batches need at least one sample and a batch size of at least 1: found {length} samples "
                f"and batch_size {batch_size}. Check the training set and data.init_args.batch_size."
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.start_batch = rank, world_size, start_batch
        self.asked: deque[tuple[int, list[tuple[int, int]]]] = deque(maxlen=REMEMBERED)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        known_pass, order = -1, np.empty(0)
        step = self.start_batch
        while True:
            first = (step * self.world_size + self.rank) * self.batch_size
            batch = []
            for draw in range(first, first + self.batch_size):
                if draw // self.length != known_pass:
                    known_pass = draw // self.length
                    order = np.random.Generator(np.random.Philox([self.seed, known_pass])).permutation(
                        self.length
                    )
                batch.append((int(order[draw % self.length]), draw))
            self.asked.append((step, batch))
            yield batch
            step += 1
