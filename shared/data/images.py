"""Images of the user's own: a folder with one folder of image files for each label."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bract.shared.data.examples import UNREADABLE, Examples
from bract.shared.data.options import Options
from bract.shared.errors import UsageError
from bract.shared.preparation import Images, Preparation
from bract.shared.terms import DataTerms, Scalar

if TYPE_CHECKING:
    from PIL.Image import Image

# Formats that Pillow reads by itself: none of them starts another program.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
SIDE = 32
_WIDE = ("I", "F")  # modes of more than 8 bits, which Pillow converts by cutting off at 255
_KNOWN: dict[str, Scalar] = {"height": SIDE, "width": SIDE, "colour": True}


def describe(options: Mapping[str, Scalar], preparation: Preparation | None) -> DataTerms:
    """Returns the terms of images by their schema; the bytes 0 to 255 become [-1, 1].

    Raises:
        UsageError: where there is no schema of images, or options beside it.
    """
    Options("images", options, _KNOWN)
    if not isinstance(preparation, Images):
        raise UsageError(
            "data set 'images' needs --schema FILE.toml, as in: "
            'kind = "images", labels = ["cat", "dog"], height = 32, width = 32'
        )
    if options:
        raise UsageError("data set 'images' has a schema: say height, width and colour in it")
    return DataTerms(
        name="images",
        shape=(3 if preparation.colour else 1, preparation.height, preparation.width),
        classes=len(preparation.labels),
        offset=127.5,
        scale=127.5,
        preparation=preparation,
    )


def schema_of(folder: Path, options: Mapping[str, Scalar]) -> Images:
    """Returns the schema of a folder of images: the names of its folders are the labels.

    For a simulation alone, whose images are the researcher's own. A site's labels come from the
    contract.

    Raises:
        UsageError: where there are not two labels, or an option will not do.
    """
    given = Options("images", {**_KNOWN, **options}, _KNOWN)
    train = folder / "train"
    inside = train if train.is_dir() else folder
    if not inside.is_dir():
        raise UsageError(f"no folder {inside}: correct --image-dir")
    labels = [path.name for path in _shown(inside) if path.is_dir()]
    if len(labels) < 2:
        raise UsageError(f"{inside} needs a folder for each label, two at least: it has {labels}")
    colour = given.given["colour"]
    if not isinstance(colour, bool):
        raise UsageError(f"data set 'images': option colour must be true or false (got {colour!r})")
    height, width = (given.whole(side, least=1) for side in ("height", "width"))
    return Images(labels=tuple(labels), colour=colour, height=height, width=width)


def read(terms: DataTerms, folder: Path) -> Examples:
    """Returns a folder's images, uint8 of (images, channels, height, width), label by label.

    An image of another size is resized without regard to its proportions. A file that is no image,
    or that lies under a label which the terms do not know, cannot be read.

    Raises:
        UsageError: where there is no such folder.
    """
    schema = _schema(terms)
    found = files(folder)
    inputs = np.zeros((len(found), *terms.shape), dtype=np.uint8)
    targets = np.full(len(found), UNREADABLE, dtype=np.int64)
    for place, path in enumerate(found):
        image = decoded(path, schema) if path.parent.name in schema.labels else None
        if image is not None:
            inputs[place], targets[place] = image[0], schema.labels.index(path.parent.name)
    return Examples(inputs=inputs, targets=targets)


def check(terms: DataTerms, folder: Path) -> list[str]:
    """Returns what is wrong with a folder's images, by file; first those that add nothing."""
    schema = _schema(terms)
    unread: list[str] = []
    resized: list[str] = []
    for path in files(folder):
        if path.parent.name not in schema.labels:
            unread.append(f"{path}: its folder is no label of the contract")
            continue
        found = decoded(path, schema)
        if found is None:
            unread.append(f"{path}: {fault(path)}")
        elif found[1] != (schema.width, schema.height):
            resized.append(f"{path}: not {schema.width}x{schema.height}, will be resized")
    return unread + resized


def decoded(path: Path, schema: Images) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Returns an image, (channels, height, width) bytes, and the (width, height) it had.

    None where it cannot be decoded.
    """
    from PIL import Image as pillow  # slow to import

    try:
        with warnings.catch_warnings(), pillow.open(path, formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # of odd files, by their content
            return fitted(image, schema), image.size
    except Exception:
        # Whatever a decoder makes of a file, a joined site does not fail on it: it would tell.
        return None


def fault(path: Path) -> str:
    """Returns why a file could not be decoded, by its head alone."""
    from PIL import Image as pillow

    try:
        with warnings.catch_warnings(), pillow.open(path, formats=FORMATS) as image:
            warnings.simplefilter("ignore")
            if image.mode.startswith(_WIDE) and not _of_16_bits(image):
                return "32-bit, signed or float pixels: save as 8 or 16 bits"
            return "not an image"
    except Exception:
        return "not an image"


def fitted(image: Image, schema: Images) -> np.ndarray:
    """Returns an image of Pillow's as (channels, height, width) bytes, resized where need be.

    Of 16 bits a pixel the upper 8 are kept, rounded.

    Raises:
        ValueError: for pixels whose range is not known, which would be cut off at 255.
    """
    from PIL.Image import Resampling

    if image.mode.startswith(_WIDE):
        image = _in_8_bits(image)
    pixels = image.convert("RGB" if schema.colour else "L")
    if pixels.size != (schema.width, schema.height):
        pixels = pixels.resize((schema.width, schema.height), Resampling.BILINEAR)
    return np.asarray(pixels).reshape(schema.height, schema.width, -1).transpose(2, 0, 1)


def _in_8_bits(image: Image) -> Image:
    from PIL import Image as pillow

    if not _of_16_bits(image):
        raise ValueError(f"pixels of mode {image.mode}")
    values = np.asarray(image).astype(np.uint32)
    return pillow.fromarray(((values + 128) // 257).astype(np.uint8))


def _of_16_bits(image: Image) -> bool:
    """Returns whether grey pixels are from 0 to 65535.

    Those of PGM, and of PNG by an older Pillow, come in the mode of 32 bits, which neither format
    has.
    """
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def files(folder: Path) -> list[Path]:
    """Returns the files within the folders of a folder, in the order of their names.

    Raises:
        UsageError: where there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}: name the one that holds a folder for each label")
    labels = [path for path in _shown(folder) if path.is_dir()]
    return [path for label in labels for path in _shown(label) if path.is_file()]


def _shown(folder: Path) -> list[Path]:
    """Returns what lies in a folder but hidden files, which systems leave behind."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _schema(terms: DataTerms) -> Images:
    if not isinstance(terms.preparation, Images):
        raise UsageError(f"data set {terms.name!r} has no schema of images in its contract")
    return terms.preparation
