"""Which classes an image is believed to show: the only guard of DiffSegmenter (arXiv 2309.02773) against
false alarms, as it stretches the map of every candidate to [0, 1].
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from functional.classes import IGNORE_INDEX, ClassTable
from models.captions import Captioner, JsonFile, VisionLanguageModel, preprocess, read_json

BRANCHES = ("synonym_matching", "image_similarity", "text_similarity")  # keys of the published files
MISSPELT = {"toothbrus": "toothbrush"}  # in the published file of COCO
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

TEMPLATE = "A photo of a {}"
CAPTION_PREFIXES = ("", "A picture of")
WORD_TOKENS = 15  # of a word or class name, with begin and end of text
STOP_WORDS = frozenset(  # of captions; none is the name of a class
    re.findall(
        r"\w+",
        """
        a an the this that these those some any each every no not and or but as if than so very it its he
        his him she her hers they their them there here who which what while other another is are was were
        be been being has have having do does of in on at by to from for with without into onto over under
        up down off out near next behind beside between around above below across through along against
        inside outside front back top bottom side one two three four five six seven eight nine ten many
        several few black white red green blue yellow brown gray grey pink purple
        """,
    )
)


class Candidates(Protocol):
    """Tells which classes each image of a batch is believed to show."""

    def __call__(self, batch: dict, table: ClassTable) -> list[list[int]]:
        """List for each image the sorted ids of its classes, without the background.

        Args:
            batch: "image" float32 [B, 3, H, W] in [0, 1], "name" list of B, perhaps "label" int64 [B, H, W].
            table: the classes.
        """
        ...


class AllCandidates:
    """Every class, whatever the image shows."""

    def __call__(self, batch: dict, table: ClassTable) -> list[list[int]]:
        return [list(range(int(table.has_background), len(table))) for _ in batch["name"]]


class LabelCandidates:
    """The classes that the label shows: an oracle, and what turns image-level labels into masks.

    Raises:
        ValueError: the batch has no labels.
    """

    def __call__(self, batch: dict, table: ClassTable) -> list[list[int]]:
        if "label" not in batch:
            raise ValueError(
                f"LabelCandidates needs labels, but the batch has only {', '.join(sorted(batch))}. Give data "
                "with labels, or take ClipCandidates, FileCandidates or AllCandidates."
            )
        absent = {IGNORE_INDEX, 0} if table.has_background else {IGNORE_INDEX}
        return [[i for i in label.unique().tolist() if i not in absent] for label in batch["label"]]


def image_id(name: str) -> str:
    """What stands for an image in any spelling: no folder, no file ending, no prefix of COCO's 2014 files."""
    base = PurePosixPath(name).name
    stem = base.rpartition(".")[0] if base.lower().endswith(IMAGE_ENDINGS) else base
    return re.sub(r"^COCO_(train|val|test)2014_", "", stem)


class FileCandidates:
    """Candidates from a JSON file: {image: [classes]}, or one such object for each branch of the filter.

    The second is the layout of the files published with DiffSegmenter and of what ClipCandidates keeps.
    Images go by image_id, so absolute paths, file names and bare ids all serve. Classes are ids, names of the
    table or the words of its prompts; the background is left out.

    Args:
        path: the file.
        branches: those whose classes are united: synonym_matching, image_similarity, text_similarity. The
            default is what the published results use. A file {image: [classes]} has none to choose from.

    Raises:
        FileNotFoundError: there is no file. ValueError: it holds something else or not these branches; when
            called: it does not know an image of the batch, or the table not one of its classes.
    """

    def __init__(self, path: str, branches: Sequence[str] = ("image_similarity", "text_similarity")):
        self.path = Path(path).expanduser()
        content = read_json(self.path)
        kept = [part for part in content.values() if isinstance(part, dict) and "of" in part]
        if len(kept) > 1:
            raise ValueError(
                f"{self.path} keeps what ClipCandidates found under {len(kept)} choices; their `of` tells "
                "them apart. Leave one in the file."
            )
        parts = self.branches_of(kept[0] if kept else content, branches)
        self.listed: dict[str, list[str | int]] = {}
        for part in parts:
            for image, classes in self.by_id(part).items():
                self.listed[image] = [*self.listed.get(image, []), *classes]
        self.table: ClassTable | None = None
        self.ids: dict[str, list[int]] = {}

    def __call__(self, batch: dict, table: ClassTable) -> list[list[int]]:
        if table != self.table:  # the whole file at once: a wrong name is found before hours of work
            self.ids, self.table = self.resolve(table), table
        for name in batch["name"]:
            if image_id(name) not in self.ids:
                raise ValueError(
                    f"{self.path} has no candidates for the image {name!r}: it lists {len(self.ids)} images, "
                    f"such as {', '.join(sorted(self.ids)[:3])}. Give the file of this data set and split."
                )
        return [self.ids[image_id(name)] for name in batch["name"]]

    def branches_of(self, content: dict, branches: Sequence[str]) -> list[dict]:
        """The objects {image: [classes]} to unite."""
        if not any(branch in content for branch in BRANCHES):
            return [content]
        if missing := [branch for branch in branches if branch not in content]:
            raise ValueError(
                f"{self.path} lacks the branches {', '.join(missing)}: found {', '.join(content)}. Leave "
                "them out of `branches` or give a file that has them."
            )
        return [content[branch] for branch in branches]

    def by_id(self, part: dict[str, list]) -> dict[str, list]:
        """Rename the keys of {image: [classes]} to image ids."""
        found: dict[str, list] = {}
        for key, classes in part.items():
            if not isinstance(classes, list) or not all(isinstance(entry, str | int) for entry in classes):
                raise ValueError(
                    f"{self.path} must list names or ids of classes for each image but has "
                    f"{reprlib.repr(classes)} for {key!r}. Correct the file."
                )
            if found.setdefault(image_id(key), classes) != classes:
                raise ValueError(
                    f"{self.path} lists the image {image_id(key)!r} twice, now as {key!r} and with other "
                    "classes. Folders do not count: rename one of the images or remove it."
                )
        return found

    def resolve(self, table: ClassTable) -> dict[str, list[int]]:
        """Turn the listed classes into sorted ids of the table."""
        known = {word: i for words in (table.names, table.words) for i, word in enumerate(words)}
        ids = {old: known.get(new) for old, new in MISSPELT.items()} | known
        ids |= {i: i for i in range(len(table))}
        resolved = {}
        for image, classes in self.listed.items():
            found = {entry: ids.get(entry) for entry in classes}
            if unknown := [entry for entry, i in found.items() if i is None]:
                near = get_close_matches(str(unknown[0]), known, n=1, cutoff=0.5)
                hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(known)}."
                raise ValueError(
                    f"{self.path} lists the class {unknown[0]!r} for {image!r}, which the class table "
                    f"{table.name!r} does not have. {hint} Correct the file or choose its class table."
                )
            resolved[image] = sorted(set(found.values()) - ({0} if table.has_background else set()))
        return resolved


def similar_to_image(similarity: Tensor, threshold: float) -> list[int]:
    """Positions of the classes nearly as similar to the image as the best: at least threshold * maximum.

    Args:
        similarity: of the image to each class, [classes], on any positive scale. The best always passes, also
            where no similarity is positive.
    """
    best = similarity.max()
    return torch.nonzero((similarity >= threshold * best) | (similarity == best)).flatten().tolist()


def similar_to_words(similarity: Tensor, threshold: float) -> list[int]:
    """Positions of the classes more similar than the threshold to some word.

    Args:
        similarity: of each class to each word, [classes, words]; of no words no class.
    """
    return torch.nonzero((similarity > threshold).any(dim=1)).flatten().tolist()


def caption_words(caption: str) -> list[str]:
    """Words of a caption that may name a thing, each once: of two letters or more, and no stop words.

    They stand for the nouns of the paper's filter, whose part-of-speech tagger would be one more dependency.
    """
    words = dict.fromkeys(re.findall(r"[^\W\d_]{2,}", caption.lower()))
    return [word for word in words if word not in STOP_WORDS]


class ClipCandidates:
    """DiffSegmenter's filter by CLIP: classes against the image and, with a captioner, against what it says.

    Image branch: cosine of the image to "A photo of a <class>", at least image_threshold times that of the
    best class. Text branch: class name and caption word are each the mean of the text network's last states
    over their own tokens, and their cosine exceeds text_threshold. The candidates are the union. Classes go
    by the words of their prompts; all is in float32, on the device of the images.

    The published results come from files (see FileCandidates) whose script is not released. This follows its
    authors' description and its first version in their next project, with two differences: words are not
    tagged, see caption_words, and those of the caption's own prefix do not count.

    Args:
        path: folder or hub name, such as openai/clip-vit-large-patch14; its files must be there at once, the
            weights are read when they are first needed.
        image_threshold: share of the best similarity that a class needs, in (0, 1].
        text_threshold: cosine that a class must exceed, in [-1, 1].
        captioner: writes the captions; None leaves the text branch out.
        cache: JSON file that keeps candidates by model, thresholds, list of classes and name of the image;
            None finds them anew each time. Names must tell images apart: give each data set its own file.

    Raises:
        FileNotFoundError: a file of the model is missing. ValueError: it is no CLIP, a threshold is outside
            its range, or the cache is damaged.
    """

    def __init__(
        self,
        path: str,
        image_threshold: float = 0.97,
        text_threshold: float = 0.8,
        captioner: Captioner | None = None,
        cache: str | None = None,
    ):
        if not (0 < image_threshold <= 1 and -1 <= text_threshold <= 1):
            raise ValueError(
                "image_threshold must be in (0, 1] and text_threshold in [-1, 1]: found "
                f"{image_threshold} and {text_threshold}. DiffSegmenter has 0.97 and 0.8."
            )
        self.clip = VisionLanguageModel(path, CLIPModel, CLIPTokenizer)
        self.image_threshold, self.text_threshold = image_threshold, text_threshold
        self.captioner = captioner
        self.cache = None if cache is None else JsonFile(cache)
        self.encoded: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, batch: dict, table: ClassTable) -> list[list[int]]:
        first = int(table.has_background)
        words, names = table.words[first:], batch["name"]
        images, texts = BRANCHES[1:]
        kept = {}
        if self.cache is not None:
            of = self.choice(words)
            key = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]
            kept = self.cache.content.get(key, {})
        passed = {
            i: (kept[images][name], kept[texts][name])
            for i, name in enumerate(names)
            if name in kept.get(images, {})
        }
        if new := [i for i in range(len(names)) if i not in passed]:
            found = self.find(batch["image"][new], [names[i] for i in new], words)
            passed |= dict(zip(new, found, strict=True))
            if self.cache is not None:
                by_image, by_text = ({names[i]: passed[i][branch] for i in new} for branch in (0, 1))
                self.cache.add({key: {"of": of, images: by_image, texts: by_text}})
        united = [{*passed[i][0], *passed[i][1]} for i in range(len(names))]
        return [[first + i for i, word in enumerate(words) if word in found] for found in united]

    def choice(self, words: Sequence[str]) -> dict:
        """What the candidates depend on besides the image."""
        choice = {"model": self.clip.key, "image_threshold": self.image_threshold, "classes": list(words)}
        if self.captioner is not None:
            choice |= {"text_threshold": self.text_threshold, "captioner": self.captioner.key}
        return choice

    @torch.no_grad()
    def find(
        self, images: Tensor, names: Sequence[str], words: Sequence[str]
    ) -> list[tuple[list[str], list[str]]]:
        """Filter classes for images [B, 3, H, W]: for each the words that pass image and text branch."""
        self.clip.load(images.device)
        model, found = self.clip.model, []
        with torch.autocast(images.device.type, enabled=False):
            prompts, classes = self.encode_classes(tuple(words), images.device)
            pixels = torch.cat([preprocess(image, self.clip.settings) for image in images])
            seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
            similarities = F.normalize(seen, dim=-1) @ prompts.T  # [B, classes]
            for image, name, similarity in zip(images, names, similarities, strict=True):
                shown, spoken = similar_to_image(similarity, self.image_threshold), []
                if said := self.said(image, name):
                    spoken = similar_to_words(classes @ self.encode_words(said).T, self.text_threshold)
                found.append(([words[i] for i in shown], [words[i] for i in spoken]))
        return found

    def said(self, image: Tensor, name: str) -> list[str]:
        """Words of the image's captions after their prefixes; none without a captioner."""
        if self.captioner is None:
            return []
        captions = zip(CAPTION_PREFIXES, self.captioner(image, name, CAPTION_PREFIXES), strict=True)
        return caption_words(" ".join(caption[len(prefix) :] for prefix, caption in captions))

    def encode_classes(self, words: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Encode a list of classes once: prompts [classes, joint width] and names [classes, text width]."""
        if words not in self.encoded:
            model = self.clip.model
            limit = model.config.text_config.max_position_embeddings
            tokens = self.tokenize([TEMPLATE.format(word) for word in words], limit)
            prompts = F.normalize(model.text_projection(model.text_model(**tokens).pooler_output), dim=-1)
            self.encoded = {words: (prompts, self.encode_words(words))}  # of the last list alone
        prompts, names = self.encoded[words]
        return prompts.to(device), names.to(device)

    def encode_words(self, words: Sequence[str]) -> Tensor:
        """Mean of the text network's last states over each word's own tokens, unit length, [words, width]."""
        tokens = self.tokenize(words, WORD_TOKENS)
        states, mask = self.clip.model.text_model(**tokens).last_hidden_state, tokens["attention_mask"]
        position = torch.arange(mask.shape[1], device=mask.device)
        own = (position > 0) & (position < mask.sum(1, keepdim=True) - 1)  # neither begin nor end of text
        return F.normalize((states * own[..., None]).sum(1), dim=-1)  # which makes the sum the mean

    def tokenize(self, texts: Sequence[str], limit: int) -> dict[str, Tensor]:
        """Token ids and mask, [texts, tokens], padded to the longest text and cut at the limit."""
        options = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
        tokens = self.clip.tokenizer(list(texts), **options)
        return {key: tokens[key].to(self.clip.model.device) for key in ("input_ids", "attention_mask")}
