"""Images in folders: FOLDER/CLASS/anything.jpg, the layout in which ImageNet is usually unpacked.

Decoding is Pillow's. A file that is no image is left out, with its name; in training the next
readable image takes its place, so a batch has its size and every rank its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from common.rejects import Rejects

SUFFIXES = {".jpg", ".jpeg", ".png"}
# Of ImageNet's training images: red, green, blue, in [0, 1].
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
# He et al., section 3.4: the shorter side becomes 256 where the middle 224 are looked at.
BORDER = 256 / 224


class BrokenImageError(ValueError):
    """A file that Pillow cannot decode."""


def pillow() -> ModuleType:
    """Return Pillow's module Image.

    Raises ModuleNotFoundError, with what to do, where it is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "image_folder: JPEG and PNG files are decoded by Pillow: pip install pillow"
        ) from error
    return Image


@dataclass(frozen=True)
class ImageFolder:
    """The files of a data set, in an order that is the same on every rank."""

    files: tuple[Path, ...]
    labels: np.ndarray  # (N,) int64, the place of the file's class in `classes`
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)


def find_images(folder: Path, classes: Sequence[str] | None = None) -> ImageFolder:
    """List the images of a folder of class folders, without opening any.

    Args:
        folder: has one folder for each class, and in it, or in folders below it, the images.
        classes: their names, where another folder has set the order; by default sorted.

    Raises:
        FileNotFoundError: the folder, or a class in it, or any image is missing.
        ValueError: it has a class that `classes` lacks.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder with one folder of images a class")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not found:
        raise FileNotFoundError(f"{folder}: expected one folder for each class, found none")
    names = tuple(found if classes is None else classes)
    if strangers := set(found) - set(names):
        raise ValueError(
            f"{folder}: the class {sorted(strangers)[0]!r} is none of the {len(names)} classes of "
            "the training images; both need folders of the same names"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        images = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not images and classes is None:
            raise FileNotFoundError(
                f"{folder / name}: expected files that end in {', '.join(sorted(SUFFIXES))}"
            )
        files += images
        labels += [label] * len(images)
    if not files:
        raise FileNotFoundError(f"{folder}: expected images in its class folders, found none")
    return ImageFolder(tuple(files), np.array(labels, np.int64), names)


def read_image(path: Path, size: int, generator: np.random.Generator | None) -> np.ndarray:
    """Return an image as (3, size, size) float32 with ImageNet's mean 0 and deviation 1.

    Args:
        path: a JPEG or PNG file of any size and mode.
        size: pixels on each side of the result.
        generator: chooses a crop of 8 to 100 % of the area with an aspect of 3/4 to 4/3, and a
            flip (Szegedy et al., arXiv 1409.4842, section 6). None: the middle.

    Raises:
        BrokenImageError: Pillow cannot decode the file, or it cannot be read.
    """
    image_module = pillow()
    try:
        with image_module.open(path) as image:
            image = image.convert("RGB")  # decodes; the file is closed after it
    # Pillow's decoders raise what they like for broken files: OSError, SyntaxError, ValueError,
    # struct.error, zlib.error, DecompressionBombError, ...
    except Exception as error:
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error
    bilinear = image_module.Resampling.BILINEAR
    if generator is None:
        box = middle(*image.size)
    else:
        box = random_crop(*image.size, generator)
    pixels = np.asarray(image.resize((size, size), bilinear, box), np.float32) / 255
    if generator is not None and generator.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(((pixels - MEAN) / DEVIATION).transpose(2, 0, 1))


Box = tuple[float, float, float, float]  # left, upper, right, lower


def middle(width: int, height: int) -> Box:
    """The square in the middle whose side is the image's shorter side over BORDER."""
    side = min(width, height) / BORDER
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def random_crop(width: int, height: int, generator: np.random.Generator) -> Box:
    """A random part of the image; the largest square in its middle if ten trials do not fit."""
    for _ in range(10):
        area = width * height * generator.uniform(0.08, 1)
        aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.integers(width - w + 1))
            upper = int(generator.integers(height - h + 1))
            return left, upper, left + w, upper + h
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def training_image(
    images: ImageFolder, index: int, size: int, seed: tuple[int, ...], rejects: Rejects
) -> tuple[np.ndarray, int]:
    """Return image and label of `index`, or of the next file that can be read.

    The crop depends on `seed` and `index` alone, so it is the same on whatever rank.
    """
    for offset in range(len(images)):
        place = (index + offset) % len(images)
        try:
            generator = np.random.default_rng((*seed, index))
            return read_image(images.files[place], size, generator), int(images.labels[place])
        except BrokenImageError as error:
            rejects.add(str(images.files[place]), str(error))
    raise BrokenImageError(f"none of {len(images)} images can be read")


def validation_image(
    images: ImageFolder, index: int, size: int, rejects: Rejects
) -> tuple[np.ndarray, int] | None:
    """Return the middle of an image and its label, or None for one that cannot be read."""
    try:
        return read_image(images.files[index], size, None), int(images.labels[index])
    except BrokenImageError as error:
        rejects.add(str(images.files[index]), str(error))
        return None
