"""Arrays of the user's own: what is not as the terms say adds nothing, and nothing is unpickled."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bract.shared import data, tasks
from bract.shared.errors import UnknownName, UsageError
from bract.shared.terms import DataTerms

INPUTS = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)


def terms(**options: Any) -> DataTerms:
    return data.describe("arrays", {"shape": "2x3", "classes": 3, **options})


def saved(folder: Path, name: str = "train", **arrays: Any) -> Path:
    np.savez(folder / f"{name}.npz", **arrays)
    return folder


def test_arrays_stay_as_they_are(tmp_path: Path) -> None:
    saved(tmp_path, inputs=INPUTS, targets=np.array([0, 1, 2, 1]))
    found = data.load_part(terms(), tmp_path, "1/1")
    np.testing.assert_array_equal(found.inputs, INPUTS)
    assert found.inputs.dtype == np.uint8
    assert found.targets.tolist() == [0, 1, 2, 1]
    assert data.check_part(terms(), tmp_path, "1/1", 4) == []


@pytest.mark.parametrize("kind", [">f4", ">i2", ">u8", "<f2", np.longdouble, bool, np.uint16])
def test_numbers_of_every_kind_are_such_as_training_takes(tmp_path: Path, kind: Any) -> None:
    """What failed in a pass would have been charged, round after round."""
    values = np.arange(24).reshape(4, 2, 3) % 2
    saved(tmp_path, inputs=values.astype(kind), targets=np.array([0, 1, 2, 1], ">i8"))
    assert data.check_part(terms(), tmp_path, "1/1", 4) == []
    found = data.load_part(terms(), tmp_path, "1/1")
    inputs = tasks.inputs_of(found.inputs, terms())
    np.testing.assert_array_equal(inputs.numpy(), values)
    assert tasks.targets_of(found.targets, terms()).tolist() == [0, 1, 2, 1]


def test_one_class_is_a_number_to_learn(tmp_path: Path) -> None:
    saved(tmp_path, inputs=INPUTS, targets=np.array([0.5, np.nan, -2, 1]))
    assert terms(classes=1).task == "value"
    found = data.load_part(terms(classes=1), tmp_path, "1/1")
    np.testing.assert_array_equal(found.targets, np.array([0.5, np.nan, -2, 1], np.float32))
    (problem,) = data.check_part(terms(classes=1), tmp_path, "1/1", 4)
    assert problem == f"{tmp_path / 'train.npz'}, example 2: unknown target"


def test_examples_that_cannot_be_used_are_named_by_their_place(tmp_path: Path) -> None:
    inputs = INPUTS.astype(np.float32)
    inputs[0, 0, 0] = np.inf
    saved(tmp_path, inputs=inputs, targets=np.array([0, 1.5, 3, np.nan]))
    assert data.load_part(terms(), tmp_path, "1/1").targets.tolist() == [0, -1, -1, -1]
    assert data.check_part(terms(), tmp_path, "1/1", 4) == [
        f"{tmp_path / 'train.npz'}, example 1: input not finite",
        *(f"{tmp_path / 'train.npz'}, example {n}: unknown target" for n in (2, 3, 4)),
    ]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"inputs": INPUTS[:, :1], "targets": np.zeros(4, int)}, "inputs have another shape"),
    "words": ({"inputs": np.full((4, 2, 3), "x"), "targets": np.zeros(4)}, "inputs are no numbers"),
    "objects": ({"inputs": np.full((4, 2, 3), {}), "targets": np.zeros(4)}, "inputs are objects"),
    "targets": ({"inputs": INPUTS, "targets": np.full(4, "x")}, "targets are no numbers"),
    "column": (
        {"inputs": INPUTS, "targets": np.zeros((4, 1))},
        "targets have another shape than (examples,)",
    ),
    "none": ({"inputs": INPUTS}, "no array 'targets': save it by numpy.savez(FILE, inputs=..., "),
    "names": ({"X": INPUTS, "y": np.zeros(4, int)}, "no array 'inputs'"),
    "fewer": ({"inputs": INPUTS, "targets": np.zeros(3, int)}, "4 inputs for 3 targets"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_file_that_is_not_as_the_terms_say_is_reported_and_fails_no_site(
    tmp_path: Path, fault: str
) -> None:
    arrays, words = BROKEN[fault]
    saved(tmp_path, **arrays)
    found = data.load_part(terms(), tmp_path, "1/1")
    assert found.inputs.shape[1:] == (2, 3)
    assert len(found.inputs) == len(found.targets) <= 4
    assert any(words in problem for problem in data.check_part(terms(), tmp_path, "1/1", 1))


def zipped(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


WHOLE = zipped(inputs=INPUTS, targets=np.zeros(4, int))
NO_ARCHIVE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "npy": (b"\x93NUMPY", "one array alone, no .npz archive: save it by numpy.savez(FILE, "),
    "text": (b"age,ill\n7x31,no\n", "no .npz archive: save it by numpy.savez(FILE, inputs=..., "),
    "half": (WHOLE[: len(WHOLE) // 2], "a damaged .npz archive: save or copy it again"),
    "no-zip": (b"PK\x03\x04 no archive", "a damaged .npz archive"),
    "of-two-disks": (
        b"PK\x03\x04" + struct.pack("<4sLQL4s18x", b"PK\x06\x07", 0, 0, 2, b"PK\x05\x06"),
        "a damaged .npz archive",
    ),
    "damaged": (WHOLE.replace(INPUTS.tobytes(), bytes(24)), "inputs are damaged: save or copy"),
}


@pytest.mark.parametrize("fault", NO_ARCHIVE)
def test_a_file_that_is_no_archive_has_no_examples_and_is_told_as_what_it_is(
    tmp_path: Path, fault: str
) -> None:
    content, words = NO_ARCHIVE[fault]
    path = tmp_path / "train.npz"
    path.write_bytes(content)
    assert len(data.load_part(terms(), tmp_path, "1/1")) == 0
    (problem, _) = data.check_part(terms(), tmp_path, "1/1", 1)
    assert problem.startswith(f"{path}: {words}")
    with pytest.raises(UsageError, match=re.escape(words)):
        data.load(terms(), path)


def test_inputs_without_their_targets_are_refused_where_a_user_can_mend_them(
    tmp_path: Path,
) -> None:
    """A joined site, whose data nobody may learn of, leaves out what is too much."""
    arrays = {"inputs": np.zeros((40, 2, 3)), "targets": np.zeros(39, int)}
    for name in ("train", "validation", "test", "all"):
        saved(tmp_path, name, **arrays)
    assert len(data.load_part(terms(), tmp_path, "1/1")) == 39
    with pytest.raises(UsageError, match=r"all\.npz: 40 inputs for 39 targets: give one for each"):
        data.load(terms(), tmp_path / "all.npz")
    with pytest.raises(UsageError, match=r"validation\.npz: 40 inputs for 39 targets"):
        data.load_public(terms(), tmp_path)


def test_options_are_needed_and_known() -> None:
    with pytest.raises(UsageError, match=r"needs the option shape, as in --set data\.options"):
        data.describe("arrays", {"classes": 3})
    with pytest.raises(UsageError, match=r"classes=10 \(got 2\.5\)"):
        data.describe("arrays", {"shape": "3", "classes": 2.5})
    with pytest.raises(UsageError, match=r"shape=1x28x28 \(got '0x3'\)"):
        data.describe("arrays", {"shape": "0x3", "classes": 2})
    with pytest.raises(UnknownName, match="did you mean 'shape'"):
        data.describe("arrays", {"shap": "3"})
    assert data.describe("arrays", {"shape": 13, "classes": 2}).shape == (13,)


def test_options_stand_in_the_contract_and_a_site_reads_by_them() -> None:
    agreed = DataTerms.model_validate_json(terms().model_dump_json())
    assert agreed == terms()
    assert hash(agreed) == hash(terms())
    assert data.dataset("arrays").fits(agreed)
    assert not data.dataset("arrays").fits(agreed.model_copy(update={"shape": (3, 2)}))
    assert not data.dataset("arrays").fits(agreed.model_copy(update={"options": {}}))
    assert "options" not in data.describe("digits").model_dump(mode="json")
