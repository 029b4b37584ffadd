"""DIFF: frozen Stable Diffusion features along an inversion path, fused into a backbone (arXiv 2406.00777).

Symbols: z is `latent`, abar `alpha_bars`, S the path's `targets`, t_i its `sources`, w `guidance`, m_p the
masks of classes, P - 1 the number of prompted classes in a crop. Where paper and released code differ, the
defaults are the code's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functional.classes import IGNORE_INDEX, class_table
from functional.noise import named_generator
from models.diffusion.features import Tap, extract_features, record_features, tap_shape
from models.diffusion.inversion import PATHS, InversionPath, stochastic_step, window_eta
from models.diffusion.stable_diffusion import StableDiffusion, check_choices
from models.fusion import Concatenation, Finecoder, SoftmaxAggregation
from models.heads.daformer import DAFormerHead

# The up blocks that are tapped, coarse to fine; block 0 (SD: stride 64) is in no level of the pyramid.
BLOCKS = (1, 2, 3)
AGGREGATIONS = {"concatenation": Concatenation, "softmax": SoftmaxAggregation}

# The classes of Cityscapes that the released code prompts for.
CITYSCAPES_PROMPTS = {
    "sidewalk": "A high quality photo; europe city; sidewalk, Paths for pedestrian use",
    "wall": "A high quality photo; europe city; wall, Outer walls of buildings or structures",
    "rider": "A high quality photo; europe city; rider, People riding bicycles, motorcycles",
    "truck": "A high quality photo; europe city; truck, Larger vehicles used for cargo transport",
    "train": "A high quality photo; europe city; train, Vehicles on railway tracks",
}

# (step, count) -> noise [count, 4, h, w]; that of step -1 samples the VAE's posterior
Draw = Callable[[int, int], Tensor]
# (block, layer, position of the saved step, feature [views, C, h, w])
Keep = Callable[[int, int, int, Tensor], None]


@dataclass
class Views:
    """The latents of a batch that the path moves, and the rows of the U-Net that steer them.

    The first B views are the images' unconditional branches, the others conditional ones. A call of the U-Net
    has a row per view with the negative prompt, then (where the prompt is another one) a row per view with
    it, then the rows of `steered`.

    Attributes:
        image: image of each view.
        conditional: of each image, the view of its conditional branch.
        steered: (view, number of the prompt) of each row with a class's prompt.
        masks: where these prompts count, [rows, 1, h, w], 0 or 1.
    """

    image: list[int]
    conditional: list[int]
    steered: list[tuple[int, int]]
    masks: Tensor | None


class DIFFBackbone(nn.Module):
    """Image to a pyramid of four levels from frozen diffusion features; only the fusion learns.

    The image's latent follows the path from clean to noisier; at the saved steps the residual branches (res)
    and transformer blocks (ca) of three up blocks are kept, fused per stride and refined to a pyramid. With a
    label, a second, conditional branch is steered by prompts inside the regions of its classes.

    Args:
        diffusion: with unet, vae_encoder, text_encoder, which is dropped once it has encoded the texts.
        classes: name of the class table of the labels.
        steps: 37, 5 or 1 for the published paths (9, 5 and 1 saved steps), or one of your own.
        prompts: texts by class name, each of which steers its region; None takes those of the released code.
        prompt, negative_prompt: of the guidance; two equal ones share their rows.
        guidance: w in e_u + w (e_text - e_u).
        eta: share of fresh noise in the steps from 10 < t < 250; 0 makes the path deterministic.
        prediction: "raw" takes the U-Net's output for the noise, as the released code does even with a model
            that predicts v; "scheduler" converts it.
        ca_reduce: "sum" over the copies of an image with different prompts (released code), or "mean".
        share_noise: both branches draw the same noise; without a prompted class they are then one.
        aggregation: "concatenation" (published) or "softmax" (a learned mean over layers and steps).
        channels: of the levels of the pyramid, coarse to fine.
        eval_seed: outside training the noise depends on this and the image's name; None draws it freely.

    Attributes:
        out_channels: of the pyramid, fine to coarse.

    Raises:
        ValueError: an option is unknown; a prompted class is not in the table; a width does not fit.
    """

    def __init__(
        self,
        diffusion: StableDiffusion,
        classes: str = "cityscapes19",
        steps: int | InversionPath = 37,
        prompts: Mapping[str, str] | None = None,
        prompt: str = "",
        negative_prompt: str = "",
        guidance: float = 5.0,
        eta: float = 1.0,
        prediction: Literal["raw", "scheduler"] = "raw",
        ca_reduce: Literal["sum", "mean"] = "sum",
        share_noise: bool = False,
        aggregation: Literal["concatenation", "softmax"] = "concatenation",
        channels: Sequence[int] = (2048, 1024, 512, 256),
        eval_seed: int | None = 0,
    ):
        super().__init__()
        for part in ("unet", "vae_encoder"):
            diffusion.require(part)
        check_choices("prediction", [prediction], ("raw", "scheduler"))
        check_choices("ca_reduce", [ca_reduce], ("sum", "mean"))
        check_choices("aggregation", [aggregation], AGGREGATIONS)
        self.path = steps if isinstance(steps, InversionPath) else find_path(steps)
        self.classes = classes
        self.guidance, self.eta, self.prediction = guidance, eta, prediction
        self.ca_reduce, self.share_noise, self.eval_seed = ca_reduce, share_noise, eval_seed
        prompts = CITYSCAPES_PROMPTS if prompts is None else prompts
        ids = sorted((class_id(classes, name), text) for name, text in prompts.items())
        prompted = torch.tensor([c for c, _ in ids], dtype=torch.long)
        self.register_buffer("prompted", prompted, persistent=False)
        self.guides = 1 if prompt == negative_prompt else 2  # rows per view without a class's prompt
        texts = [negative_prompt, prompt][: self.guides] + [text for _, text in ids]
        # Computed again at each construction, so they do not belong into a checkpoint.
        self.register_buffer("contexts", diffusion.encode_text(texts), persistent=False)
        self.register_buffer("times", torch.tensor(self.path.sources), persistent=False)
        diffusion.free_text_encoder()
        self.diffusion = diffusion
        self.taps = {block: block_taps(diffusion.unet, block) for block in BLOCKS}
        self.places = {tap: (block, layer) for block in BLOCKS for layer, tap in enumerate(self.taps[block])}
        check_widths(channels)
        *fused, _ = channels
        self.aggregations = nn.ModuleList(
            AGGREGATIONS[aggregation](
                len(taps), len(self.path.saved), tap_shape(diffusion.unet, taps[0])[0], width
            )
            for taps, width in zip(self.taps.values(), fused, strict=True)
        )
        self.finecoder = Finecoder(channels)
        self.out_channels = list(reversed(channels))

    def train(self, mode: bool = True) -> "DIFFBackbone":
        """As usual for the fusion; the diffusion model stays in eval mode."""
        super().train(mode)
        self.diffusion.eval()
        return self

    def forward(self, image: Tensor, names: Sequence[str] | None = None) -> list[Tensor]:
        """Pyramid of the unconditional branch.

        Args:
            image: [B, 3, H, W] in [0, 1], H and W multiples of the model's stride.
            names: of the images, which seed their noise outside training; None seeds all alike.

        Returns:
            Levels [B, C, h, w], fine to coarse, float32; the finest has half the latent's stride (SD: 4).

        Raises:
            ValueError: sizes are no multiples of the stride, or there are not as many names as images.
        """
        if names is not None and len(names) != len(image):
            raise ValueError(f"Each image needs a name: found {len(names)} names for {len(image)} images.")
        draw = self.draw_freely(image)
        if not self.training and self.eval_seed is not None:
            draw = self.draw_by_name(image, names or [""] * len(image))
        return self.fuse(image, self.views(len(image)), draw)

    def branches(
        self, image: Tensor, label: Tensor, draw: Draw | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Pyramids of the conditional and of the unconditional branch, as in forward.

        Args:
            image: as in forward.
            label: class ids [B, H, W], 255 ignored.
            draw: noise; None draws it freely. It is asked for the views' at step -1, to sample the posterior,
                and at each step with fresh noise for that of the views and then of the steered rows; with
                share_noise for that of the images in place of the views.
        """
        views = self.views(len(image), label)
        levels = self.fuse(image, views, draw or self.draw_freely(image))
        return [level[views.conditional] for level in levels], [level[: len(image)] for level in levels]

    def fuse(self, image: Tensor, views: Views, draw: Draw) -> list[Tensor]:
        """Pyramid of all views."""
        stride = self.diffusion.stride
        if any(side % stride for side in image.shape[-2:]):
            raise ValueError(
                f"The backbone takes images whose sides are multiples of {stride}: found "
                f"{list(image.shape[-2:])}. Pad them by diffusion.pad, and cut the result by diffusion.unpad."
            )
        if torch.is_grad_enabled():
            features = FeatureBuffer(self.taps, len(self.path.saved))
            self.extract(image, views, draw, features.keep)
            pairs = zip(self.aggregations, BLOCKS, strict=True)
            return self.finecoder([fuse(features.concatenated(block)) for fuse, block in pairs])
        sums = dict.fromkeys(BLOCKS)
        by_block = dict(zip(BLOCKS, self.aggregations, strict=True))

        def keep(block: int, layer: int, step: int, feature: Tensor) -> None:
            sums[block] = by_block[block].add(feature.float(), layer, step, sums[block])

        self.extract(image, views, draw, keep)
        return self.finecoder([by_block[block].finish(sums[block]) for block in BLOCKS])

    def draw_freely(self, image: Tensor) -> Draw:
        """Noise from torch's global generator of the image's device, as dropout takes it."""
        shape = latent_shape(self.diffusion, image)
        return lambda step, count: torch.randn(count, *shape, device=image.device)

    def draw_by_name(self, image: Tensor, names: Sequence[str]) -> Draw:
        """Noise that depends on each image's name and eval_seed only, the same on every device."""
        shape = latent_shape(self.diffusion, image)
        generators = [named_generator(name, self.eval_seed) for name in names]

        def draw(step: int, count: int) -> Tensor:
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            return noise.to(image.device, non_blocking=True)

        return draw

    def views(self, images: int, label: Tensor | None = None) -> Views:
        """The views of a batch; with labels [B, H, W] also those of the conditional branch.

        A class steers its image alone. (The released code gives all images of a batch the prompts of all; its
        batches have one image.)
        """
        image = list(range(images))
        if label is None:
            return Views(image, [], [], None)
        pixels = label == self.prompted[:, None, None, None]  # [classes, B, H, W]
        # By the whole label: a class too small for a mask at the latent's size adds its row all the same.
        present = pixels.flatten(2).any(2).T.tolist()
        branched = [i for i in image if any(present[i]) or not self.share_noise]
        conditional = [images + branched.index(i) if i in branched else i for i in image]
        steered = [(i, c) for i in image for c, there in enumerate(present[i]) if there]
        factor = self.diffusion.vae_factor
        # Of each cell the first pixel, as `nearest` takes it.
        masks = [pixels[c, i, ::factor, ::factor] for i, c in steered]
        return Views(
            image + branched,
            conditional,
            [(conditional[i], c) for i, c in steered],
            torch.stack(masks)[:, None].float() if masks else None,
        )

    @torch.no_grad()
    def extract(self, image: Tensor, views: Views, draw: Draw, keep: Keep) -> None:
        """Move the views along the path and hand each feature of a saved step to `keep`."""
        count, last = len(views.image), max(self.path.saved)
        steered = torch.tensor([view for view, _ in views.steered], dtype=torch.long, device=image.device)
        rows = torch.cat([torch.arange(count, device=image.device), steered])
        numbers = [guide for guide in range(self.guides) for _ in range(count)]
        numbers += [self.guides + c for _, c in views.steered]
        context = self.contexts[numbers]
        # Row p of a view counts inside its mask; the neutral one, p = 0, everywhere.
        weights = image.new_ones(count, 1, 1, 1)
        if views.steered:
            height, width = views.masks.shape[-2:]
            weights = torch.cat([weights.expand(-1, -1, height, width), views.masks])
            total = torch.zeros_like(weights[:count]).index_add(0, rows, weights)
            weights = weights / total[rows]
        mean, deviation = self.diffusion.posterior(image)
        latent = mean[views.image] + deviation[views.image] * self.noise(draw, -1, views, 0)
        for i, (t, s) in enumerate(zip(self.path.sources, self.path.targets, strict=True)):
            inputs = torch.cat([latent] * self.guides + [latent[steered]])
            output, features = self.call(i, inputs, context, stop=i == last)
            for tap, feature in features.items():
                block, layer = self.places[tap]
                if tap.startswith("res"):
                    kept = feature[:count]
                else:
                    kept = self.reduce_copies(feature, steered, count)
                keep(block, layer, self.path.saved.index(i), kept)
            if i == last:
                return
            noise = output if self.prediction == "raw" else self.diffusion.to_noise(output, inputs, t)
            plain = noise[:count]
            guided = plain[rows] + self.guidance * (noise[count * (self.guides - 1) :] - plain[rows])
            eta = window_eta(t, self.eta)
            fresh = self.noise(draw, i, views, len(steered)) if eta else None
            alpha_t, alpha_s = self.diffusion.alpha_bars[t], self.diffusion.alpha_bars[s]
            moved = weights * stochastic_step(latent[rows], guided, alpha_t, alpha_s, eta, fresh)
            latent = moved[:count].index_add(0, steered, moved[count:])

    def noise(self, draw: Draw, step: int, views: Views, steered: int) -> Tensor:
        """Fresh noise of the views, then of the steered rows."""
        if not self.share_noise:
            return draw(step, len(views.image) + steered)
        images = max(views.image) + 1
        drawn = draw(step, images + steered)
        return torch.cat([drawn[views.image], drawn[images:]])

    def call(
        self, step: int, latent: Tensor, context: Tensor, stop: bool
    ) -> tuple[Tensor | None, dict[Tap, Tensor]]:
        """Output of the U-Net in a step, and what is tapped in it: nothing where it is not saved.

        With `stop` nothing after the last tap runs, and there is no output.
        """
        unet = self.diffusion.unet
        arguments = self.diffusion.unet_arguments(latent, self.times[step], context)
        if step not in self.path.saved:
            return unet(*arguments).sample.float(), {}
        if stop:
            return None, extract_features(unet, list(self.places), *arguments)
        with record_features(unet, list(self.places)) as features:
            output = unet(*arguments).sample.float()
        return output, features

    def reduce_copies(self, feature: Tensor, steered: Tensor, count: int) -> Tensor:
        """Sum (or mean) of a feature over the copies of each view, [count, C, h, w].

        The released code has a copy with the negative prompt and one with the prompt; a row that stands for
        both counts twice.
        """
        guides = feature[: count * self.guides].unflatten(0, (self.guides, count)).sum(0)
        total = (3 - self.guides) * guides
        total = total.index_add(0, steered, feature[count * self.guides :])
        if self.ca_reduce == "sum":
            return total
        copies = torch.full_like(total[:, :1, :1, :1], 2)
        return total / copies.index_add(0, steered, torch.ones_like(copies[:1]).expand(len(steered), 1, 1, 1))


class FeatureBuffer:
    """The features of each block, in the U-Net's precision, as they are kept.

    Args:
        taps: of each block.
        steps: number of saved steps.
    """

    def __init__(self, taps: Mapping[int, Sequence[Tap]], steps: int):
        self.taps, self.steps = taps, steps
        self.buffers: dict[int, Tensor] = {}

    def keep(self, block: int, layer: int, step: int, feature: Tensor) -> None:
        """Write a feature [views, C, h, w] into its place; all layers of a block have equal widths."""
        views, width, *size = feature.shape
        if block not in self.buffers:
            layers = len(self.taps[block])
            self.buffers[block] = feature.new_empty(views, layers, self.steps, width, *size)
        self.buffers[block][:, layer, step] = feature

    def concatenated(self, block: int) -> Tensor:
        """The features of a block, float32 [views, layers * steps * C, h, w]."""
        return self.buffers[block].flatten(1, 3).float()


class DIFF(nn.Module):
    """DIFF's backbone with DAFormer's head: image [B, 3, H, W] in [0, 1] to logits [B, C, H, W].

    Images of any size are padded right and bottom with their edge pixels to the model's stride; logits are
    cut back.

    Args:
        backbone: see DIFFBackbone.
        num_classes: of the logits.
        embed_channels, channels, dropout: of the head.
    """

    def __init__(
        self,
        backbone: DIFFBackbone,
        num_classes: int,
        embed_channels: int = 256,
        channels: int = 256,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.backbone = backbone
        self.head = DAFormerHead(
            backbone.out_channels, num_classes, embed_channels, channels, dropout=dropout, classifier_std=0.01
        )

    def forward(self, image: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Logits of the unconditional branch; names of the images seed their noise, see DIFFBackbone."""
        padded = self.backbone.diffusion.pad(image)
        return self.backbone.diffusion.unpad(self.head(self.backbone(padded, names)), image)

    def branches(self, image: Tensor, label: Tensor, draw: Draw | None = None) -> tuple[Tensor, Tensor]:
        """Logits [B, C, h, w] of the conditional and of the unconditional branch, in the size of the head.

        Args:
            image: as in forward. label: [B, H, W], 255 ignored. draw: see DIFFBackbone.branches.
        """
        padded = self.backbone.diffusion.pad(image)
        rows, columns = (a - b for a, b in zip(padded.shape[-2:], label.shape[-2:], strict=True))
        label = F.pad(label, (0, columns, 0, rows), value=IGNORE_INDEX)
        conditional, unconditional = self.backbone.branches(padded, label, draw)
        # One after the other: each has batch statistics and dropout of its own.
        return self.head(conditional), self.head(unconditional)


def check_widths(channels: Sequence[int]) -> None:
    """Raise a ValueError for widths of the pyramid that its normalisations cannot divide."""
    multiples = (64, 64, 64, 32)
    if len(channels) != 4 or any(w < by or w % by for w, by in zip(channels, multiples, strict=True)):
        raise ValueError(
            f"channels are four widths, coarse to fine, multiples of 64, the last of 32: found "
            f"{list(channels)}. Published: [2048, 1024, 512, 256]."
        )


def find_path(steps: int) -> InversionPath:
    """The published path of this number of steps.

    Raises:
        ValueError: there is none.
    """
    if steps not in PATHS:
        raise ValueError(f"DIFF has no path of {steps} steps: set steps to {', '.join(map(str, PATHS))}.")
    return PATHS[steps]


def class_id(classes: str, name: str) -> int:
    """Id of a class that a prompt is given for.

    Raises:
        ValueError: the class table has no such class.
    """
    names = class_table(classes).names
    if name not in names:
        raise ValueError(
            f"prompts names a class that the table {classes!r} does not have: found {name!r}. Set the "
            f"backbone's prompts to texts for some of {', '.join(names)}."
        )
    return names.index(name)


def block_taps(unet: nn.Module, block: int) -> list[str]:
    """The taps of an up block in the order of concatenation: residual branches, then transformer blocks."""
    layers = range(len(unet.up_blocks[block].resnets))
    return [f"{kind}.{block}.{layer}" for kind in ("res", "ca") for layer in layers]


def latent_shape(diffusion: StableDiffusion, image: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of the latent of an image [B, 3, H, W]."""
    height, width = (side // diffusion.vae_factor for side in image.shape[-2:])
    return diffusion.latent_channels, height, width
