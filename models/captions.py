"""Captions by BLIP (arXiv 2201.12086), as DiffSegmenter (arXiv 2309.02773) asks for them: for each class the
sentence that begins with "a photograph of <class>".

VisionLanguageModel and JsonFile, which keeps answers, serve CLIP too (models/candidates.py).
"""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePath

import numpy as np
import torch
from huggingface_hub import HfApi, snapshot_download
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer, BlipForConditionalGeneration, PreTrainedModel

from models.diffusion.weights import HUB_TIMEOUT_S, PROJECT_FOLDERS, ROOT, name_some

MAX_TOKENS = 20  # of a caption with its begin of text and its prefix, as in the released code
PREFIXES_PER_PASS = 16  # bounds the memory of attention to the image: some 45 MB each in the large BLIP

NEEDED = (  # files of a model folder, alternatives side by side
    ("config.json",),
    ("model.safetensors",),
    ("preprocessor_config.json", "processor_config.json"),
    ("tokenizer.json", "vocab.txt", "vocab.json"),
)
DOWNLOADED = ["*.json", "vocab.txt", "merges.txt", "model.safetensors"]
READ = (  # all that answers may depend on
    *(name for any_of in NEEDED for name in any_of),
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "merges.txt",
)


def find_folder(path: str) -> Path:
    """Folder of a model: `path` itself, else the local hub cache, else downloaded from the hub.

    Args:
        path: local folder in the layout of transformers, relative to the current folder or else to the
            project's root, or hub name. Weights are taken from safetensors only.

    Raises:
        FileNotFoundError: a file is missing and cannot be had; the message names it and a way out.
    """

    def missing_files(folder: Path) -> list[str]:
        return [" or ".join(any_of) for any_of in NEEDED if not any((folder / f).is_file() for f in any_of)]

    folder, reason = Path(path).expanduser(), "not asked"
    folder = folder if folder.exists() else ROOT / folder  # an absolute path stays as it is
    no_hub_name = path.count("/") != 1 or path.startswith((".", "/", "~"))
    if not (folder.is_dir() or no_hub_name or path.split("/")[0] in PROJECT_FOLDERS):
        with suppress(FileNotFoundError):
            folder = Path(snapshot_download(path, local_files_only=True))
        try:
            if missing_files(folder):
                # This fails within seconds where a download would wait.
                HfApi().model_info(path, timeout=HUB_TIMEOUT_S)
                folder, reason = Path(snapshot_download(path, allow_patterns=DOWNLOADED)), "asked"
        except Exception as error:  # every kind of network failure ends in the same way out
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if missing := missing_files(folder):
        raise FileNotFoundError(
            f"The model {path!r} lacks {'; '.join(missing)} in {str(folder)!r} (hub: {reason}). Give as "
            "`path` a folder in which save_pretrained wrote model and processor, or a hub name that `hf "
            "download` has brought into a shared HF_HOME."
        )
    return folder


class VisionLanguageModel:
    """A BLIP or CLIP in the layout of transformers: found at once, read when it is first used.

    Args:
        path: see find_folder.
        kind, tokenizer: classes of transformers.

    Attributes:
        model: frozen, float32 and in eval mode; None until it is loaded, as are the next.
        tokenizer: of its kind. settings: how the model wants its images, for preprocess.

    Raises:
        FileNotFoundError: a file is missing. ValueError: the folder holds another kind of model.
    """

    def __init__(self, path: str, kind: type[PreTrainedModel], tokenizer: type):
        self.path, self.folder, self.kind, self.tokenizer_kind = path, find_folder(path), kind, tokenizer
        self.model = self.tokenizer = self.settings = None
        found, wanted = self.read("config.json").get("model_type"), kind.config_class.model_type
        if found != wanted:
            raise ValueError(
                f"{path!r} is another kind of model: its config.json says {found!r}, not {wanted!r}. Give "
                f"the `path` of a {kind.__name__}."
            )

    def read(self, *names: str) -> dict:
        """Read the first of these JSON files that exists."""
        file = next(self.folder / name for name in names if (self.folder / name).is_file())
        return json.loads(file.read_text("utf-8"))

    @cached_property
    def key(self) -> str:
        """What kept answers go by: the last part of the path, and a SHA-256 over the files of the model.

        They hold for a copy in another place, and not for other weights in the same one.
        """
        digest = hashlib.sha256()
        for file in filter(Path.is_file, (self.folder / name for name in READ)):
            with file.open("rb") as content:
                digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
        return f"{PurePath(self.path).name} {digest.hexdigest()[:16]}"

    def load(self, device: torch.device) -> None:
        """Read tokenizer and weights if that was not done, and move the model to the device.

        Raises:
            ValueError: missing, unexpected or mismatched keys; the message names at most 10 of each kind.
        """
        if self.model is None:
            settings = self.read(*NEEDED[2])
            self.settings = settings.get("image_processor", settings)  # as newer transformers write it
            self.tokenizer = self.tokenizer_kind.from_pretrained(self.folder, local_files_only=True)
            self.model = self.read_weights()
        self.model.to(device)

    def read_weights(self) -> PreTrainedModel:
        """Read the weights, where transformers itself would only warn of a missing one and draw it."""
        model, found = self.kind.from_pretrained(
            self.folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # so that they are told of here, all at once
            output_loading_info=True,
        )
        problems = {
            "missing": found["missing_keys"],
            # Older files hold the numbers 0, 1, 2 .. of the positions, which are computed today.
            "unexpected": [key for key in found["unexpected_keys"] if not key.endswith("position_ids")],
            "mismatched": [
                f"{key} (file {list(a)}, model {list(b)})" for key, a, b in found["mismatched_keys"]
            ],
        }
        if any(problems.values()):
            parts = [f"{problem}: {name_some(keys)}" for problem, keys in problems.items() if keys]
            raise ValueError(
                f"{self.folder} does not hold the weights of a {self.kind.__name__}; {'; '.join(parts)}. "
                "Config and weights must come from the same model: fetch the folder anew or give another."
            )
        return model.requires_grad_(False).eval()


def preprocess(image: Tensor, settings: dict) -> Tensor:
    """Resize, crop and normalise as a model's own processor does, in 8 bits with Pillow's filter.

    Args:
        image: [3, H, W] in [0, 1]; of an 8-bit image the stored values are found again.
        settings: preprocessor_config.json of a BLIP or CLIP.

    Returns:
        float32 [1, 3, h, w] on the image's device.
    """
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    picture = Image.fromarray(pixels.contiguous().numpy())
    size, crop = settings["size"], settings.get("crop_size") if settings.get("do_center_crop") else None
    if isinstance(size, int):  # older files: the shorter side where the centre is cropped, else both
        size = {"shortest_edge": size} if crop else {"height": size, "width": size}
    if short := size.get("shortest_edge"):
        width, height = (int(short * side / min(picture.size)) for side in picture.size)
    else:
        width, height = size["width"], size["height"]
    picture = picture.resize((width, height), Image.Resampling(settings.get("resample", 3)))
    if crop:
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        left, top = (width - crop["width"]) // 2, (height - crop["height"]) // 2
        picture = picture.crop((left, top, left + crop["width"], top + crop["height"]))
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    mean, deviation = (torch.tensor(settings[key])[:, None, None] for key in ("image_mean", "image_std"))
    return ((values - mean) / deviation)[None].to(image.device)


class JsonFile:
    """Dictionaries within dictionaries in a JSON file that several processes may fill.

    What is added joins what the file holds by then, and the whole replaces the file at once: a reader sees
    the old content or the new, never a part. Of two processes that write in the same instant one may lose
    its addition, which is then computed again.

    Attributes:
        content: what was read, with what was added.

    Raises:
        ValueError: the file is there but holds no JSON object.
    """

    def __init__(self, path: str):
        self.path = Path(path).expanduser()
        self.content = read_json(self.path) if self.path.exists() else {}

    def add(self, entries: dict) -> None:
        """Merge the entries into the file."""
        if self.path.exists():
            merge(self.content, read_json(self.path))
        merge(self.content, entries)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{platform.node()}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.content), "utf-8")
        os.replace(temporary, self.path)


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        FileNotFoundError, ValueError: there is no file, or it holds something else; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no JSON file {str(path)!r}. Check the path.")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Delete it or give another file.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold a JSON object but holds a {type(content).__name__}. Give another file."
        )
    return content


def merge(target: dict, source: dict) -> None:
    """Put the entries of source into target, in place; dictionaries on both sides are merged in turn."""
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            merge(target[key], value)
        else:
            target[key] = value


class Captioner:
    """Continues text about an image with BLIP: greedily, in float32, on the device of the image.

    The image passes the vision tower once whatever the number of prefixes. Prefixes are batched only where
    they have equally many tokens, so that a caption does not depend on its neighbours: BLIP's own `generate`
    overwrites the first column and drops the last, and padding there changes captions without a word.

    Args:
        path: folder or hub name, such as Salesforce/blip-image-captioning-large; its files must be there at
            once, the weights are read when the first caption is made.
        cache: JSON file that keeps captions by model (its files are read once for their SHA-256), name of the
            image and prefix; None makes each anew. Names must tell images apart: give each data set a file of
            its own.

    Raises:
        FileNotFoundError: a file of the model is missing. ValueError: it is no BLIP, or the cache is damaged.
    """

    def __init__(self, path: str, cache: str | None = None):
        self.path, self.blip = path, VisionLanguageModel(path, BlipForConditionalGeneration, BertTokenizer)
        self.cache = None if cache is None else JsonFile(cache)
        self.seen: tuple[Tensor, Tensor] | None = None  # the last image and its tokens

    def __call__(self, image: Tensor, name: str, prefixes: Sequence[str]) -> list[str]:
        """Write a caption for each prefix.

        Args:
            image: [3, H, W] in [0, 1], at its own size.
            name: of the image in its data set.
            prefixes: how the captions begin; "" leaves the beginning to BLIP.

        Returns:
            In the order of the prefixes: the prefix in lower case as words of their own, then what BLIP adds,
            perhaps nothing.

        Raises:
            ValueError: a prefix leaves no room for a caption of MAX_TOKENS tokens.
        """
        known = {} if self.cache is None else self.cache.content.get(self.key, {}).get(name, {})
        made = {}
        if new := [prefix for prefix in dict.fromkeys(prefixes) if prefix not in known]:
            made = dict(zip(new, self.generate(image, new), strict=True))
            if self.cache is not None:
                self.cache.add({self.key: {name: made}})
        return [{**known, **made}[prefix] for prefix in prefixes]

    @property
    def key(self) -> str:
        """What kept captions go by, see VisionLanguageModel."""
        return self.blip.key

    @torch.no_grad()
    def generate(self, image: Tensor, prefixes: Sequence[str]) -> list[str]:
        """Write the captions with BLIP, whatever the cache holds; arguments and result as in a call."""
        self.blip.load(image.device)
        begin = self.blip.model.config.text_config.bos_token_id
        starts = [
            [begin, *self.blip.tokenizer(prefix, add_special_tokens=False)["input_ids"]]
            for prefix in prefixes
        ]
        for prefix, start in zip(prefixes, starts, strict=True):
            if len(start) >= MAX_TOKENS:
                raise ValueError(
                    f"The prefix {prefix!r} leaves no room for a caption: it has {len(start)} tokens with "
                    f"the begin of text, and captions end at {MAX_TOKENS}. Shorten the prefix or the name."
                )
        captions = [""] * len(prefixes)
        with torch.autocast(image.device.type, enabled=False):
            seen = self.see(image)
            for length in sorted({len(start) for start in starts}):
                equal = [i for i, start in enumerate(starts) if len(start) == length]
                for first in range(0, len(equal), PREFIXES_PER_PASS):
                    members = equal[first : first + PREFIXES_PER_PASS]
                    added = self.continue_text([starts[i] for i in members], seen)
                    for i, tokens in zip(members, added, strict=True):
                        captions[i] = self.join(prefixes[i], tokens)
        return captions

    def see(self, image: Tensor) -> Tensor:
        """The vision tower's tokens of an image, [1, tokens, width]; those of the last image are kept."""
        if self.seen is None or not torch.equal(self.seen[0], image):
            pixels = preprocess(image, self.blip.settings)
            self.seen = image, self.blip.model.vision_model(pixel_values=pixels).last_hidden_state
        return self.seen[1]

    def continue_text(self, starts: list[list[int]], seen: Tensor) -> list[list[int]]:
        """Tokens that follow each of these equally long starts, up to but without the end of text.

        Args:
            starts: token ids with the begin of text.
            seen: the vision tower's tokens of one image, [1, tokens, width].
        """
        config = self.blip.model.config.text_config
        tokens = torch.tensor(starts, device=seen.device)
        seen = seen.expand(len(starts), -1, -1)
        written = self.blip.model.text_decoder.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            max_length=MAX_TOKENS,
            num_beams=1,
            do_sample=False,
            eos_token_id=config.sep_token_id,
            pad_token_id=config.pad_token_id,
        )
        added = [row[tokens.shape[1] :] for row in written.tolist()]
        end = config.sep_token_id
        return [row[: row.index(end)] if end in row else row for row in added]

    def join(self, prefix: str, tokens: list[int]) -> str:
        """Write the caption so that it begins with the words of the prefix.

        Pieces that BLIP glues to the last of them ("plane" to "planes") are left out: the class name must
        stay a word that can be found.
        """
        decode = self.blip.tokenizer.decode
        while tokens and decode(tokens[:1]).startswith("##"):
            tokens = tokens[1:]
        return f"{prefix.strip().lower()} {decode(tokens, skip_special_tokens=True)}".strip()
