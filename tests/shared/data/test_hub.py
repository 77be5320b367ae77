"""Files that the library `datasets` reads, and the hub where it cannot be reached."""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bract.shared import data
from bract.shared.errors import UsageError

# The library leaves a file that it cannot read to the collector of garbage.
LEFT_OPEN = "ignore::pytest.PytestUnraisableExceptionWarning"
POINTS = {"input": "x", "target": "y", "shape": "2", "classes": 2}


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_of_numbers_are_read_and_a_row_that_is_none_adds_nothing(tmp_path: Path) -> None:
    rows = [{"x": [1.5, 2], "y": 1}, {"x": [1], "y": 0}, {"x": [3, 4], "y": 7}, {"x": [0, 0]}]
    jsonl(tmp_path / "train.jsonl", rows)
    terms = data.describe("hub", POINTS)
    found = data.load_part(terms, tmp_path, "1/1")
    assert found.inputs.tolist() == [[1.5, 2], [0, 0], [3, 4], [0, 0]]
    assert found.targets.tolist() == [1, -1, -1, -1]
    assert data.check_part(terms, tmp_path, "1/1", 4) == [
        f"{tmp_path / 'train.jsonl'}, row {n}: input or target cannot be read" for n in (2, 3, 4)
    ]
    assert data.dataset("hub").fits(terms)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_line_that_is_no_row_adds_nothing_and_the_others_are_read(tmp_path: Path) -> None:
    path, row = tmp_path / "train.jsonl", b'{"x": [1, 2], "y": 1}\n'
    path.write_bytes(row + b"{broken\n" + row + b"\n" + b"[1]\n" + b"\xff\n" + row)
    terms = data.describe("hub", POINTS)
    assert data.load_part(terms, tmp_path, "1/1").targets.tolist() == [1, -1, 1, -1, -1, 1]
    assert data.check_part(terms, tmp_path, "1/1", 6) == [
        f"{path}, row {n}: input or target cannot be read" for n in (2, 4, 5)
    ]


@pytest.mark.filterwarnings(LEFT_OPEN)
def test_a_csv_file_is_read_up_to_where_it_breaks_and_that_is_told(tmp_path: Path) -> None:
    path, rows = tmp_path / "train.csv", "".join(f"{n},{n % 2}\n" for n in range(20_000))
    terms = data.describe("hub", {**POINTS, "shape": "1"})
    path.write_text("x,y\n" + rows)
    found = data.load_part(terms, tmp_path, "1/1")
    assert found.inputs[:, 0].tolist() == list(range(20_000))
    assert found.targets[:3].tolist() == [0, 1, 0]
    assert data.check_part(terms, tmp_path, "1/1", 1) == []
    path.write_text("x,y\n" + rows + "1,2,3,4\n")
    read = len(data.load_part(terms, tmp_path, "1/1"))
    assert 0 < read <= 20_000
    assert data.check_part(terms, tmp_path, "1/1", 1) == [
        f"{path}: nothing after row {read} can be read; mend the file there"
    ]
    gc.collect()


def test_images_of_a_parquet_file_are_resized_to_the_shape(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    def png(value: int) -> dict[str, bytes | None]:
        file = io.BytesIO()
        Image.new("L", (6, 6), value).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    broken = {"bytes": b"no image", "path": "/etc/hostname"}
    table = pyarrow.table({"image": [png(9), broken, png(200)], "label": [0, 1, 1]})
    parquet.write_table(table, tmp_path / "train.parquet")
    options = {"input": "image", "target": "label", "shape": "1x4x4", "classes": 2}
    found = data.load_part(data.describe("hub", options), tmp_path, "1/1")
    assert found.inputs.shape == (3, 1, 4, 4)
    assert [image.max() for image in found.inputs] == [9, 0, 200]
    assert found.targets.tolist() == [0, -1, 1]


@pytest.mark.filterwarnings(LEFT_OPEN)
@pytest.mark.parametrize("name", ["train.jsonl", "train.csv", "train.parquet"])
@pytest.mark.parametrize("content", [b"", b"\xff\x00{", b'{"x": [1, 2], "y": 1}\n{"x"'])
def test_a_broken_file_fails_no_site(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    terms = data.describe("hub", POINTS)
    assert not np.isnan(data.load_part(terms, tmp_path, "1/1").inputs).any()
    assert data.check_part(terms, tmp_path, "1/1", 1)
    gc.collect()


def test_a_folder_is_simulated_through_the_real_command(
    bract: Callable[..., Any], tmp_path: Path
) -> None:
    for part, count in (("train", 300), ("validation", 20), ("test", 60)):
        rows = [{"x": [n % 2, -(n % 2)], "y": n % 2} for n in range(count)]
        jsonl(tmp_path / f"{part}.jsonl", rows)
    given = {**POINTS, "shape": '"2"'}
    options = [word for k, v in given.items() for word in ("--set", f"data.options.{k}={v}")]
    done = bract(
        *("simulate", "--data", "hub", "--set", f"data.dir={tmp_path}", *options),
        *("--model", "linear", "--sites", "2", "--rounds", "10", "--workers", "1", "--out", "run"),
        *("--set", "privacy.batch=60", "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test_accuracy"] > 0.9


def test_a_hub_that_cannot_be_reached_is_one_line_with_a_remedy() -> None:
    terms = data.describe("hub", {**POINTS, "source": "nobody/nothing"})
    with pytest.raises(UsageError, match=r"'nobody/nothing' cannot be had from the hub") as raised:
        data.load_public(terms, None)
    assert "name it with --set data.dir=FOLDER" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match="needs the option source"):
        data.load_public(data.describe("hub", POINTS), None)
