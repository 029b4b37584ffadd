"""Check data sets before training on them: all faults in one report, exit code 1 if there are any.

    python -m scripts.check_data cityscapes=data/cityscapes deliver=data/deliver --workers 8

Faults: images or labels that are missing (by the published numbers), damaged or of the wrong kind; labels of
another size than their image or with ids that the data set does not have; splits without images; two images
of one name, as x.jpg and x.png; pictures that two splits share. The last line counts them by kind.
"""

import argparse
import hashlib
import importlib
import os
import pkgutil
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import PurePosixPath

import numpy as np
from tqdm import tqdm

import datamodules
from config_files import UsageError, nearest, short_errors
from datamodules.auxiliary import neighbours
from datamodules.files import FileDataModule, FileDataset, check_sizes
from datamodules.reading import IMAGE_SUFFIXES, UnreadableFile
from mistakes import edge_errors


@dataclass
class Found:
    """What images and labels hold: sizes (height, width), ids, images of more than one colour by hash; and
    (kind, message) of each fault."""

    sizes: Counter = field(default_factory=Counter)
    ids: set[int] = field(default_factory=set)
    images: dict[str, str] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        self.sizes += other.sizes
        self.ids |= other.ids
        self.images |= other.images
        self.faults += other.faults


def file_fault(error: Exception, other: str) -> tuple[str, str]:
    """Kind and message of what is wrong with a file; `other` is the kind where it can be read."""
    known = {FileNotFoundError: "missing file", UnreadableFile: "damaged file"}
    return next((kind for cls, kind in known.items() if isinstance(error, cls)), other), str(error)


def data_sets() -> dict[str, type[FileDataModule]]:
    """Return the DataModules of files in datamodules/ by name."""
    for module in pkgutil.iter_modules(datamodules.__path__):
        importlib.import_module(f"datamodules.{module.name}")
    return {kind.layout.name: kind for kind in FileDataModule.__subclasses__()}


def check_sample(dataset: FileDataset, index: int) -> Found:
    """Read an image and its label as training does, and keep what is wrong instead of raising it."""
    found, pair, image = Found(), dataset.pairs[index], None
    try:
        image = dataset.read_image(index)
        found.sizes[image.shape[:2]] += 1
        if (image != image[0, 0]).any():  # event frames without events are equal without being shared
            found.images[hashlib.sha256(image).hexdigest()] = pair.image
    except (FileNotFoundError, ValueError) as error:
        found.faults.append(file_fault(error, "image of the wrong kind"))
    if pair.label is not None:
        try:
            label = dataset.read_label(index)
            found.ids |= set(np.flatnonzero(np.bincount(label.ravel())).tolist())
        except (FileNotFoundError, ValueError) as error:
            found.faults.append(file_fault(error, "label with unknown ids or of the wrong kind"))
        else:
            if image is not None and dataset.same_size:
                try:
                    check_sizes(dataset.root, pair, image, label)
                except ValueError as error:
                    found.faults.append(("label of another size", str(error)))
    return found


def same_names(dataset: FileDataset) -> Iterator[str]:
    """Tell of files beside the images that differ from one of them in the suffix alone."""
    names = {str(PurePosixPath(image).with_suffix("")): image for image in dataset.image_names}
    for file in sorted(neighbours(dataset.root, dataset.image_names).difference(dataset.image_names)):
        path = PurePosixPath(file)
        if path.suffix.lower() in IMAGE_SUFFIXES and (image := names.get(str(path.with_suffix("")))):
            yield f"{dataset.root / file} has the name of {image}, which is read: leave one of the two."


def check_split(data: FileDataModule, split: str, pool: Executor) -> tuple[Found, str]:
    """Check a split; return what was found and a line about it."""
    dataset, found = data.find(split), Found()
    folders = Counter(pair.image.split("/")[1] for pair in dataset.pairs)
    expected = data.layout.counts.get(split, folders)
    if folders and folders.keys().isdisjoint(expected):  # no folders, or others: only the sum can be compared
        folders, expected = Counter({"*": len(dataset)}), {"*": sum(expected.values())}
    for folder in sorted({*folders, *expected}):
        if folders[folder] != expected.get(folder, 0):
            text = f"found {folders[folder]} images, published are {expected.get(folder, 0)}."
            found.faults.append(("wrong number of images", f"{split}, folder {folder}: {text}"))
    if not len(dataset):
        found.faults.append(("empty split", f"{split}: found no {data.root / data.pattern(split)}."))
    found.faults += [("name of two images", text) for text in same_names(dataset)]
    samples = pool.map(partial(check_sample, dataset), range(len(dataset)))
    title = f"{data.layout.title} {split}"
    for sample in tqdm(samples, total=len(dataset), desc=title, unit="image", disable=None, leave=False):
        found.add(sample)
    published = "{1}x{0}".format(*data.layout.size) if data.layout.size else "many sizes"
    sizes = ", ".join(f"{w}x{h} ({n})" for (h, w), n in found.sizes.most_common())
    ids = f", ids {' '.join(map(str, sorted(found.ids)))}" if found.ids else ""
    return found, f"{split}: {len(dataset)} images, sizes {sizes} (published {published}){ids}"


def check(data: FileDataModule, pool: Executor) -> Iterator[tuple[str, str | None]]:
    """Check all splits of a data set: the lines of its report, and the kind of those that are a fault."""
    yield f"{data.layout.title} in {data.root}", None
    splits = {}
    for split in data.layout.images:
        splits[split], line = check_split(data, split, pool)
        yield f"  {line}", None
        yield from ((f"  FAULT {text}", kind) for kind, text in splits[split].faults)
    for (one, first), (other, second) in combinations(splits.items(), 2):
        for digest in sorted(first.images.keys() & second.images.keys()):
            paths = f"{first.images[digest]} ({one}) and {second.images[digest]} ({other})"
            yield f"  FAULT {paths} show the same picture: splits must not overlap.", "picture in two splits"


def arguments(argv: list[str] | None, doc: str, option: str, meaning: str) -> argparse.Namespace:
    """Parse data sets, workers and a switch of the command that `doc` explains."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="NAME=ROOT", help="name and folder of a data set")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="files read at a time")
    parser.add_argument(option, action="store_true", help=meaning)
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1: found {args.workers}")
    return args


def named_folders(words: list[str], known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Split the words NAME=ROOT.

    Raises:
        UsageError: a word is none, or names no known data set.
    """
    for name, _, root in (word.partition("=") for word in words):
        if name not in known or not root:
            guess = nearest(name, known) or " or ".join(sorted(known))
            raise UsageError(f"{name}={root} is no data set and its folder: did you mean {guess}=ROOT?")
        yield name, root


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv, __doc__, "--rescale-16-bit", "accept images of 16 bits")
    known, faults = data_sets(), Counter()
    with edge_errors(), ThreadPoolExecutor(args.workers) as pool:
        for name, root in named_folders(args.sets, known):
            data = known[name](root, rescale_16_bit=args.rescale_16_bit)
            for line, kind in check(data, pool):
                print(line)
                faults.update([kind] if kind else [])
    kinds = ", ".join(f"{kind} ({number})" for kind, number in sorted(faults.items()))
    print(f"{faults.total()} faults: {kinds}" if faults else "no faults")
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    with short_errors():
        main()
