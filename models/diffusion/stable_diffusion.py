"""Stable Diffusion as a feature extractor: VAE, U-Net and text encoder, all sizes read from the configs."""

from collections.abc import Collection, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from functional.noise import add_noise, alpha_bars
from models.diffusion.attention import use_attention_backend
from models.diffusion.conditioning import add_time_residual
from models.diffusion.features import extract_features, modules_after
from models.diffusion.weights import find_model, load_part, read_config

PARTS = {"unet": "unet", "vae_encoder": "vae", "vae_decoder": "vae", "text_encoder": "text_encoder"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FAMILIES = {768: "SD 1.x", 1024: "SD 2.x"}


class StableDiffusion(nn.Module):
    """A Stable Diffusion in the layout of diffusers, frozen and in eval mode.

    Args:
        path: local folder, alias (sd-1.4, sd-1.5, sd-2.1-base, sd-2.1) or hub name; a local copy
            is used before any network.
        parts: those of unet, vae_encoder, vae_decoder, text_encoder that are loaded; the others stay None.
        dtype: of the weights. Latents and predictions keep float32.
        vae_dtype: of the VAE's weights, where it is another; a trained U-Net needs float32, the VAE does not.
        attention: kernel of the U-Net's attention; xformers needs CUDA and the extra `gpu`.
        channels_last: store convolution weights and activations as NHWC.
        compile: backend of torch.compile ("inductor", "aot_eager") for the U-Net's attention, feed-forward
            and encoder layers; None runs eagerly. Taps, recorders and early stops work with both.
        untrained_seed: a control for comparisons: the U-Net's weights are drawn by diffusers' own
            initialisation under this seed instead of read; VAE and text encoder are read as ever.

    Attributes:
        vae_factor: image pixels per latent pixel. stride: image pixels per pixel of the deepest U-Net level;
            sizes of images should be multiples of it.
        num_tokens, context_width: of the text embedding. latent_channels, scaling_factor: of the latent.
        prediction_type: "epsilon" or "v_prediction". alpha_bars: [steps], float64, on the CPU.

    Raises:
        FileNotFoundError: files are missing. ValueError: weights and config disagree; an option is unknown.
    """

    def __init__(
        self,
        path: str,
        parts: Sequence[str] = ("unet", "vae_encoder", "text_encoder"),
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        attention: Literal["sdpa", "xformers"] = "sdpa",
        channels_last: bool = False,
        compile: str | None = None,
        untrained_seed: int | None = None,
        vae_dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    ):
        super().__init__()
        check_choices("parts", parts, PARTS)
        check_choices("dtype", [dtype], DTYPES)
        check_choices("vae_dtype", [vae_dtype or dtype], DTYPES)
        self.path, self.parts = path, tuple(parts)
        self.dtype, self.vae_dtype = DTYPES[dtype], DTYPES[vae_dtype or dtype]
        random_unet = untrained_seed is not None and "unet" in parts
        folders = dict.fromkeys(PARTS[part] for part in parts if not (part == "unet" and random_unet))
        self.folder = find_model(path, folders)
        self.read_configs()
        self.unet = self.load_unet(untrained_seed) if "unet" in parts else None
        self.vae = self.load_vae() if "vae" in folders else None
        self.tokenizer = self.text_encoder = None
        self.text_cache: dict[str, Tensor] = {}
        if "text_encoder" in parts:
            self.tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)
            config = CLIPTextConfig.from_pretrained(self.folder / "text_encoder")
            with torch.random.fork_rng(devices=[]):  # its random values are replaced at once
                self.text_encoder = CLIPTextModel(config)
            load_part(self.text_encoder, self.folder, "text_encoder", self.dtype)
        if channels_last:
            self.to(memory_format=torch.channels_last)
        if self.unet is not None:
            use_attention_backend(self.unet, attention)
            if compile is not None:
                compile_blocks(self.unet, compile)
        self.requires_grad_(False).eval()

    def read_configs(self) -> None:
        """Take every size from the configs of the folder; see the class for their meaning."""
        unet, vae = read_config(self.folder, "unet/config.json"), read_config(self.folder, "vae/config.json")
        text = read_config(self.folder, "text_encoder/config.json")
        steps = read_config(self.folder, "scheduler/scheduler_config.json")
        self.context_width, self.num_tokens = unet["cross_attention_dim"], text["max_position_embeddings"]
        if text["hidden_size"] != self.context_width:
            families = [
                FAMILIES.get(width, "unknown family") for width in (self.context_width, text["hidden_size"])
            ]
            raise ValueError(
                f"{self.folder} mixes two models: its U-Net wants text of width {self.context_width} "
                f"({families[0]}) and its text encoder gives {text['hidden_size']} ({families[1]}). "
                "Take both from one model."
            )
        self.latent_channels = vae["latent_channels"]
        # Configs of SD 1.x leave out what is the default of diffusers.
        self.scaling_factor = vae.get("scaling_factor", 0.18215)
        self.vae_factor = 2 ** (len(vae["block_out_channels"]) - 1)
        self.stride = self.vae_factor * 2 ** (len(unet["block_out_channels"]) - 1)
        self.prediction_type = steps.get("prediction_type", "epsilon")
        check_choices("prediction_type", [self.prediction_type], ("epsilon", "v_prediction"))
        for option in ("trained_betas", "rescale_betas_zero_snr"):
            if steps.get(option):
                raise ValueError(
                    f"{self.folder}/scheduler sets {option}, which is not supported: use another model."
                )
        self.alpha_bars = alpha_bars(
            steps["beta_start"], steps["beta_end"], steps["num_train_timesteps"], steps["beta_schedule"]
        )

    def load_unet(self, untrained_seed: int | None) -> UNet2DConditionModel:
        config = UNet2DConditionModel.load_config(self.folder / "unet", local_files_only=True)
        if untrained_seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(untrained_seed)
                unet = UNet2DConditionModel.from_config(config)
            return nn.Module.to(unet, self.dtype)  # diffusers' own `to` warns of a cast that is wanted here
        with torch.device("meta"):  # no time and memory for random values that are replaced at once
            unet = UNet2DConditionModel.from_config(config)
        load_part(unet, self.folder, "unet", self.dtype)
        return unet

    def load_vae(self) -> AutoencoderKL:
        config = AutoencoderKL.load_config(self.folder / "vae", local_files_only=True)
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(config)
        skip = ()
        if "vae_encoder" not in self.parts:
            vae.encoder = vae.quant_conv = None
            skip += ("encoder.", "quant_conv.")
        if "vae_decoder" not in self.parts:
            vae.decoder = vae.post_quant_conv = None
            skip += ("decoder.", "post_quant_conv.")
        load_part(vae, self.folder, "vae", self.vae_dtype, skip)
        return vae

    @property
    def device(self) -> torch.device:
        return next(self.parameters(), torch.empty(0)).device  # without any part left: the CPU

    def require(self, part: str) -> None:
        """Raise a ValueError that tells how to load the part, if it is not there."""
        module = {"unet": self.unet, "text_encoder": self.text_encoder}.get(part, self.vae)
        if module is None or part not in self.parts:
            raise ValueError(f"{part} is not loaded: `parts` is {list(self.parts)}; add {part!r} to it.")

    @torch.no_grad()
    def encode(self, image: Tensor, generator: Generator | list[Generator] | None = None) -> Tensor:
        """Scaled latent of an image.

        Args:
            image: [B, 3, H, W] in [0, 1], H and W multiples of vae_factor.
            generator: None takes the posterior's mean; else a sample is drawn, with a list from one generator
                per image (CPU generators give the same sample on every device).

        Returns:
            [B, latent_channels, H / vae_factor, W / vae_factor], float32.
        """
        mean, deviation = self.posterior(image)
        if generator is None:
            return mean
        return mean + deviation * randn_tensor(mean.shape, generator, mean.device, mean.dtype)

    @torch.no_grad()
    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of an image's scaled latent; shapes as in encode."""
        self.require("vae_encoder")
        with torch.autocast(
            image.device.type, enabled=False
        ):  # the VAE runs in the dtype that it was loaded with
            found = self.vae.encode((2 * image - 1).to(self.vae_dtype)).latent_dist
        return self.scaling_factor * found.mean.float(), self.scaling_factor * found.std.float()

    def pad(self, image: Tensor) -> Tensor:
        """Continue an image [B, 3, H, W] right and bottom by its edge pixels to multiples of the stride."""
        height, width = image.shape[-2:]
        return F.pad(image, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")

    def unpad(self, logits: Tensor, image: Tensor) -> Tensor:
        """Logits [B, C, h, w] of a padded image, bilinear to its size, cut to that of the image itself."""
        height, width = image.shape[-2:]
        size = (height + -height % self.stride, width + -width % self.stride)
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Image [B, 3, H, W], float32, of a scaled latent, in [0, 1] but not clipped to it."""
        self.require("vae_decoder")
        with torch.autocast(latent.device.type, enabled=False):
            image = self.vae.decode((latent / self.scaling_factor).to(self.vae_dtype)).sample
        return (image.float() + 1) / 2

    def add_noise(self, latent: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """Latent at a timestep (int or [B]) of the model's schedule, float32."""
        if isinstance(timestep, Tensor):
            timestep = timestep.cpu()
        return add_noise(latent, noise, self.alpha_bars[timestep])

    @torch.inference_mode(False)  # what is kept in a validation must be usable in training
    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], keep: bool = True) -> Tensor:
        """Last hidden states, after the final norm, of padded texts: [N, num_tokens, context_width].

        Each text is encoded once and, with `keep`, kept, so repeated texts cost nothing and survive
        free_text_encoder().

        Raises:
            ValueError: a text has more tokens than the model can read; nothing is cut silently.
        """
        new, known = [text for text in dict.fromkeys(texts) if text not in self.text_cache], self.text_cache
        if new:
            self.require("text_encoder")
            for text, ids in zip(new, self.tokenizer(new)["input_ids"], strict=True):
                if len(ids) > self.num_tokens:
                    kept = self.tokenizer.decode(ids[: self.num_tokens - 1], skip_special_tokens=True)
                    raise ValueError(
                        f"The text {text!r} has {len(ids)} tokens with begin and end and the model reads "
                        f"{self.num_tokens}: shorten it. What would fit is {kept!r}."
                    )
            tokens = self.tokenizer(
                new, padding="max_length", max_length=self.num_tokens, return_tensors="pt"
            )
            hidden = self.text_encoder(
                tokens["input_ids"].to(self.device)
            ).last_hidden_state  # pads are attended
            known = known | dict(zip(new, hidden, strict=True))
            self.text_cache = known if keep else self.text_cache
        return torch.stack([known[text].to(self.device) for text in texts])

    def free_text_encoder(self) -> None:
        """Drop the text encoder from memory; texts that were encoded remain available."""
        self.text_encoder = None

    def unet_arguments(
        self, latent: Tensor, timestep: int | Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of the U-Net's forward in its dtype, the context expanded over the batch."""
        self.require("unet")
        timestep = torch.as_tensor(timestep, device=latent.device).expand(len(latent))
        context = context.to(latent.device, self.dtype).expand(len(latent), -1, -1)
        return latent.to(self.dtype), timestep, context

    def predict(
        self, latent: Tensor, timestep: int | Tensor, context: Tensor, time_residual: Tensor | None = None
    ) -> Tensor:
        """The U-Net's raw output in float32: noise or velocity, as prediction_type says.

        Args:
            latent: [B, latent_channels, h, w], scaled, at the timestep (int or [B]).
            context: [B or 1, num_tokens, context_width].
            time_residual: [1 or B, width of the time MLP], added to the time MLP's output.
        """
        arguments = self.unet_arguments(latent, timestep, context)
        with add_time_residual(self.unet, time_residual):
            return self.unet(*arguments).sample.float()

    def predict_noise(self, latent: Tensor, timestep: int, context: Tensor) -> Tensor:
        """The noise in the latent, for v-prediction e = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) latent."""
        return self.to_noise(self.predict(latent, timestep, context), latent, timestep)

    def to_noise(self, output: Tensor, latent: Tensor, timestep: int) -> Tensor:
        """The noise in a latent by the U-Net's raw output, as prediction_type says."""
        if self.prediction_type == "epsilon":
            return output
        alpha_bar = float(self.alpha_bars[timestep])
        return alpha_bar**0.5 * output + (1 - alpha_bar) ** 0.5 * latent

    def features(
        self,
        latent: Tensor,
        timestep: int | Tensor,
        context: Tensor,
        taps: Sequence[int | str],
        time_residual: Tensor | None = None,
    ) -> list[Tensor]:
        """Tapped decoder features [B, C, h, w] in the order of taps; no block runs after the last of them."""
        arguments = self.unet_arguments(latent, timestep, context)
        with add_time_residual(self.unet, time_residual):
            features = extract_features(self.unet, taps, *arguments)
        return [features[tap] for tap in taps]

    def train_unet(self, last_layer: int | None = None, gradient_checkpointing: bool = False) -> None:
        """Let the U-Net learn; with last_layer only what feeds that decoder layer: no parameter idles.

        Raises:
            ValueError: the weights are not float32, where small updates would be rounded away.
        """
        self.require("unet")
        if self.dtype != torch.float32:
            raise ValueError(
                f"A trained U-Net needs `dtype: float32` (found {self.dtype}): its updates are smaller than "
                "half precision resolves. For speed set trainer.precision to bf16-mixed or 16-mixed."
            )
        self.unet.requires_grad_(True)
        for module in [] if last_layer is None else modules_after(self.unet, last_layer):
            module.requires_grad_(False)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()


def check_choices(option: str, given: Collection[str], known: Collection[str]) -> None:
    """Raise a ValueError that names the option, what was given and what is known."""
    wrong = [value for value in given if value not in known]
    if wrong:
        raise ValueError(f"{option} holds {', '.join(map(repr, wrong))}: choose from {', '.join(known)}.")


def compile_blocks(unet: UNet2DConditionModel, backend: str) -> None:
    """Compile the units in which nothing is ever tapped.

    torch.compile does not notice hooks that are set on or in a compiled module later: the decoder's resnets
    and the transformers as a whole stay eager; their attention and feed-forward layers are compiled.
    """
    for name, module in unet.named_modules():
        encoder_resnet = isinstance(module, ResnetBlock2D) and not name.startswith("up_blocks")
        if encoder_resnet or isinstance(module, Attention) or name.endswith(".ff"):
            module.compile(backend=backend, dynamic=False)
