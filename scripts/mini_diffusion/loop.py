"""What the trainings of the mini models share: their clock, rates, averages, loss, random numbers and log."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from functional.noise import add_noise
from scripts.mini_diffusion.state import refuse_other, save_state

SAVE_SECONDS = 180
LOG_STEPS = 50
LARGEST_WEIGHT = 10.0  # of a timestep's squared error


@dataclass
class Clock:
    """Seconds of one stage, over all of its runs; the learning rate follows their share of the budget."""

    budget: float
    spent: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Spent in earlier runs and in this one."""
        return self.spent + time.monotonic() - self.started

    @property
    def share(self) -> float:
        """Spent part of the budget, at most 1."""
        return min(self.seconds / self.budget, 1.0)


def cosine_rate(base: float, step: int, share: float, warmup: int = 150, floor: float = 0.05) -> float:
    """Linear warm-up over steps, then cosine from `base` to `floor` * base over the spent share of time."""
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))
    return base * cosine * min(1.0, (step + 1) / warmup)


@torch.no_grad()
def update_ema(average: nn.Module, live: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * live; of parameters only, as no part keeps statistics."""
    torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), 1 - decay)


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy that takes no gradient: where the moving average lives."""
    kind = type(module)
    copy = kind.from_config(module.config) if hasattr(kind, "from_config") else kind(module.config)
    copy.load_state_dict(module.state_dict())
    return copy.requires_grad_(False).eval()


def draw_timesteps(batch: int, generator: torch.Generator) -> Tensor:
    """Stratified timesteps [B]: half of them over 0..999, half over 200..899, where the layout is decided."""
    half = batch // 2
    rest = batch - half
    whole = (torch.arange(rest) + torch.rand(rest, generator=generator)) / rest * 1000
    middle = (torch.arange(half) + torch.rand(half, generator=generator)) / half * 700 + 200
    return torch.cat([whole, middle]).long()


def denoising_loss(unet, text_encoder, batch: dict, alpha_bars: Tensor, generator: torch.Generator) -> Tensor:
    """Weighted mean squared error of the predicted noise (DDPM, arXiv 2006.11239, eq. 14).

    The weight 1 / alpha_bar makes it the error of the velocity (arXiv 2202.00512, section 4); at most
    LARGEST_WEIGHT, for it grows without bound. Without it the small errors of the late timesteps, where the
    caption decides what is drawn, hardly count.

    Args:
        unet: gives the predicted noise as `sample` for (noised latent, timestep, context).
        batch: "latent" [B, 4, h, w] and "tokens" [B, tokens].
        alpha_bars: [1000].
    """
    latent, tokens = batch["latent"], batch["tokens"]
    timestep = draw_timesteps(len(latent), generator).to(latent.device)
    noise = torch.randn(latent.shape, generator=generator).to(latent.device)
    noised = add_noise(latent, noise, alpha_bars[timestep]).contiguous(memory_format=torch.channels_last)
    context = text_encoder(tokens).last_hidden_state
    error = (unet(noised, timestep, context).sample - noise).square().mean((1, 2, 3))
    return (error / alpha_bars[timestep].clamp(min=1 / LARGEST_WEIGHT)).mean()


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, so that a resumed training draws those it would have drawn."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Log:
    """One JSON object a line, printed as well."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def __call__(self, **values) -> None:
        line = json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()})
        tqdm.write(line)
        with self.path.open("a") as file:
            file.write(line + "\n")


@dataclass
class Training:
    """Modules and their moving averages on their way through a budget of time.

    What `path` holds is gone on from. The rate is cosine_rate's, gradients are clipped to norm 1.

    Args:
        name: in progress bar and log.
        modules: what is trained, by name.
        lr: peak learning rate.
        path: of the state, written every few minutes and at the end.
        identity: what makes this training another one, stored with the state.
        decay: bound of the moving averages' share of the past.
    """

    name: str
    modules: dict[str, nn.Module]
    lr: float
    clock: Clock
    path: Path
    identity: dict
    weight_decay: float = 1e-3
    warmup: int = 150
    decay: float = 0.998
    step: int = field(default=0, init=False)
    samples: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Raises a ValueError if the state in `path` is of another training."""
        device = next(next(iter(self.modules.values())).parameters()).device
        self.averages = {name: frozen_copy(module).to(device) for name, module in self.modules.items()}
        self.parameters = [p for module in self.modules.values() for p in module.parameters()]
        options = {"lr": self.lr, "betas": (0.9, 0.99), "weight_decay": self.weight_decay}
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True, **options)
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            refuse_other(self.path, state["identity"], self.identity)
            for name, part in self.parts().items():
                part.load_state_dict(state[name])
            self.clock.spent, self.step, self.samples = state["seconds"], state["step"], state["samples"]

    def parts(self) -> dict:
        """All that has a state, by its name in the file."""
        averages = {f"ema_{name}": average for name, average in self.averages.items()}
        return {**self.modules, **averages, "optimizer": self.optimizer}

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts().items()} | self.counts()
        save_state(self.path, state | {"identity": self.identity})

    def counts(self) -> dict:
        """Steps, samples and seconds so far."""
        return {"step": self.step, "samples": self.samples, "seconds": self.clock.seconds}

    def record(self) -> dict:
        """The same for the card of the result."""
        return {"steps": self.step, "samples": self.samples, "seconds": round(self.clock.seconds)}

    def over(self) -> bool:
        """Whether no time is left, which is said: else it would look like a training of no steps."""
        spent = self.clock.share >= 1
        if spent:
            minutes = self.clock.budget / 60
            tqdm.write(f"{self.path} has spent its {minutes:g} minutes: more --minutes train it further.")
        return spent

    def run(self, forward: Callable[[int], tuple[int, dict[str, Tensor]]], log: "Log") -> None:
        """Train until the time is spent.

        Args:
            forward: from the number of a step to the samples it saw and its figures, of which "loss" is
                minimised and the means of all are logged.
        """
        self.clock.started = saved = time.monotonic()
        progress = tqdm(initial=self.step, desc=self.name, unit="step", disable=None)
        figures = defaultdict(list)
        while self.clock.share < 1:
            samples, found = forward(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = cosine_rate(self.lr, self.step, self.clock.share, self.warmup)
            self.optimizer.zero_grad(set_to_none=True)
            found["loss"].backward()
            clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            for name, average in self.averages.items():
                update_ema(average, self.modules[name], min(self.decay, 1 - 1 / (self.step + 2)))
            self.step, self.samples = self.step + 1, self.samples + samples
            for name, figure in found.items():
                figures[name].append(figure.detach())
            progress.update()
            if self.step % LOG_STEPS == 0:
                means = {name: torch.stack(values).mean().item() for name, values in figures.items()}
                log(stage=self.name, **self.counts(), **means)
                figures.clear()
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()
