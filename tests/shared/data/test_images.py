"""Folders of images: one size by a fixed rule, and a file that is no image adds nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bract.shared import data, encoding
from bract.shared.data import images
from bract.shared.errors import UnknownName, UsageError
from bract.shared.preparation import Images

RED, GREY = (200, 10, 10), (90, 90, 90)
SCHEMA = Images(labels=("cat", "dog"), height=4, width=6)


def drawn(path: Path, colour: Any = RED, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    drawn(tmp_path / "train/dog/b.png", GREY)
    drawn(tmp_path / "train/cat/a.bmp")
    drawn(tmp_path / "train/cat/large.png", size=(12, 12))
    return tmp_path


def test_images_are_read_label_by_label_as_bytes_of_channels_first(folder: Path) -> None:
    terms = data.describe("images", {}, SCHEMA)
    assert (terms.shape, terms.classes) == ((3, 4, 6), 2)
    found = data.load_part(terms, folder, "1/1")
    assert (found.inputs.shape, found.inputs.dtype) == ((3, 3, 4, 6), np.uint8)
    assert found.targets.tolist() == [0, 0, 1]
    assert [image[:, 0, 0].tolist() for image in found.inputs] == [[*RED], [*RED], [*GREY]]
    # the constants take bytes to [-1, 1]
    assert [(byte - terms.offset) / terms.scale for byte in (0, 255)] == [-1, 1]


def test_grey_images_have_one_channel(folder: Path) -> None:
    terms = data.describe("images", {}, SCHEMA.model_copy(update={"colour": False}))
    found = data.load_part(terms, folder, "1/1")
    assert found.inputs.shape == (3, 1, 4, 6)
    assert found.inputs[2, 0, 0, 0] == 90


def test_check_names_files_that_would_be_resized_or_add_nothing(folder: Path) -> None:
    (folder / "train/dog/none.png").write_bytes(b"no image")
    drawn(folder / "train/bird/c.png")
    (folder / "train/.thumbnails").mkdir()
    (folder / "train/cat/.DS_Store").write_bytes(b"left behind")
    terms = data.describe("images", {}, SCHEMA)
    found = data.load_part(terms, folder, "1/1")
    assert found.targets.tolist() == [-1, 0, 0, 1, -1]
    assert not found.inputs[-1].any()
    train = folder / "train"
    assert data.check_part(terms, folder, "1/1", 9) == [
        f"{train / 'bird/c.png'}: its folder is no label of the contract",
        f"{train / 'dog/none.png'}: not an image",
        f"{train / 'cat/large.png'}: not 6x4, will be resized",
        "images 1/1: fewer rows than the nominal size 9: declare a lower one",
    ]


GREYS = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)  # the first 0, the last 65535
OF_16_BITS = ("a.png", "b.tiff", "c.pgm", "of-bytes-turned.tiff")


def of_16_bits(folder: Path, name: str) -> Path:
    """Returns a file with the greys above, of 16 bits a pixel."""
    folder.mkdir(parents=True, exist_ok=True)
    path, bytes_turned = folder / name, GREYS.astype(">u2").tobytes()
    if name.endswith(".pgm"):
        path.write_bytes(b"P5 6 4 65535\n" + bytes_turned)
    elif name == "of-bytes-turned.tiff":
        Image.frombytes("I;16B", (6, 4), bytes_turned).save(path)
    else:
        Image.fromarray(GREYS).save(path)
    return path


@pytest.mark.parametrize("colour", [False, True])
def test_of_16_bits_a_pixel_the_upper_8_are_read(tmp_path: Path, colour: bool) -> None:
    """Pillow cuts them off at 255: every image would be white, and trained on."""
    for name in OF_16_BITS:
        of_16_bits(tmp_path / "train/cat", name)
    terms = data.describe("images", {}, SCHEMA.model_copy(update={"colour": colour}))
    found = data.load_part(terms, tmp_path, "1/1")
    assert found.targets.tolist() == [0, 0, 0, 0]
    expected = np.broadcast_to(np.round(GREYS / 257), found.inputs.shape)
    np.testing.assert_array_equal(found.inputs, expected)
    assert data.check_part(terms, tmp_path, "1/1", 4) == []


def test_of_an_older_pillow_a_png_of_16_bits_is_read_too(tmp_path: Path) -> None:
    with Image.open(of_16_bits(tmp_path, "a.png")) as image:
        wide = Image.fromarray(np.asarray(image).astype(np.int32))
    wide.format = "PNG"  # as Pillow 10 opens it
    assert wide.mode == "I"
    np.testing.assert_array_equal(images.fitted(wide, SCHEMA)[0], np.round(GREYS / 257))


def test_pixels_of_no_known_range_add_nothing_and_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As fractions all of them would be black."""
    for n in range(40):
        drawn(tmp_path / ("cat" if n % 2 else "dog") / f"{n}.png", size=(3, 3))
    for name, kind in (("float", np.float32), ("32-bit", np.int32)):
        Image.fromarray(GREYS.astype(kind)).save(tmp_path / f"cat/{name}.tiff")
    terms = data.describe("images", {}, SCHEMA)
    told = "32-bit, signed or float pixels: save as 8 or 16 bits"
    assert images.check(terms, tmp_path)[:3] == [
        f"{tmp_path / 'cat/32-bit.tiff'}: {told}",
        f"{tmp_path / 'cat/float.tiff'}: {told}",
        f"{tmp_path / 'cat/1.png'}: not 6x4, will be resized",
    ]
    with pytest.raises(UsageError, match=rf"float\.tiff cannot be read \({told}\): mend it or"):
        encoding.image_inputs(SCHEMA, terms, [tmp_path / "cat/float.tiff"])
    data.load(terms, tmp_path)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path}: 2 of 42 examples cannot be read")
    assert record.getMessage().endswith(f"; the first: {tmp_path / 'cat/32-bit.tiff'}: {told}")


@given(content=st.binary(max_size=200), place=st.integers(0, 80))
def test_no_file_at_all_fails_a_site(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, place: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-image/train/cat/x.png"
    drawn(path, size=(30, 30))
    whole = path.read_bytes()
    terms = data.describe("images", {}, SCHEMA)
    for text in (content, whole[:place] + content, whole[:place] + content + whole[place:]):
        path.write_bytes(text)
        found = data.load_part(terms, path.parent.parent.parent, "1/1")
        assert found.inputs.shape == (1, 3, 4, 6)
        assert found.targets[0] in (-1, 0)


def test_an_image_far_too_large_is_not_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # 12 × 12 is over twice as many
    found = data.load_part(data.describe("images", {}, SCHEMA), folder, "1/1")
    assert found.targets.tolist() == [0, -1, 1]


def test_a_format_that_starts_another_program_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "x.eps"
    Image.new("RGB", (6, 4), RED).save(path)
    with Image.open(path) as known:
        assert known.format == "EPS"
    assert images.decoded(path, SCHEMA) is None


def test_labels_of_a_simulation_are_the_names_of_the_folders(folder: Path) -> None:
    assert images.schema_of(folder, {"height": 8}) == Images(
        labels=("cat", "dog"), height=8, width=32
    )
    assert images.schema_of(folder / "train", {}).labels == ("cat", "dog")
    with pytest.raises(UsageError, match="needs a folder for each label, two at least"):
        images.schema_of(folder / "train/cat", {})
    with pytest.raises(UsageError, match="correct --image-dir"):
        images.schema_of(folder / "none", {})
    with pytest.raises(UsageError, match="height"):
        images.schema_of(folder, {"height": 0})
    with pytest.raises(UnknownName, match="did you mean 'width'"):
        images.schema_of(folder, {"widht": 3})


def test_a_site_takes_its_labels_from_the_contract_alone(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"needs --schema FILE\.toml, as in: kind = \"images\""):
        data.describe("images")
    terms = data.describe("images", {}, SCHEMA.model_copy(update={"labels": ("dog", "mouse")}))
    assert data.load_part(terms, folder, "1/1").targets.tolist() == [-1, -1, 0]
    assert data.dataset("images").fits(terms)


def test_a_server_opens_no_training_image(tmp_path: Path) -> None:
    for part in ("validation", "test"):
        drawn(tmp_path / part / "cat/a.png")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/cat").write_text("no folder: opening it would fail")
    terms = data.describe("images", {}, SCHEMA)
    assert [len(part) for part in data.load_public(terms, tmp_path)] == [1, 1]


def test_a_folder_without_parts_is_cut_for_a_simulation(tmp_path: Path) -> None:
    for n in range(40):
        drawn(tmp_path / ("cat" if n % 2 else "dog") / f"{n}.png", (n, n, n))
    splits = data.load(data.describe("images", {}, SCHEMA), tmp_path)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [32, 2, 6]
    assert set(splits.train.targets) == {0, 1}
