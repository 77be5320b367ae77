"""Data of the user's own in real processes over TLS: a table, images, and a factory's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from PIL import Image
from processes import held_port

from bract.shared import canonical
from bract.simulations.federations import loopback
from bract.simulations.federations.loopback import Layout, Processes, SitePlan

Bract = Callable[..., Any]
ROWS, PUBLIC = 120, 40
SITES = ("alpha", "beta")


def table(folder: Path, part: str, count: int) -> None:
    """Measures of people of whom the older ones are ill."""
    folder.mkdir(parents=True, exist_ok=True)
    made = np.random.default_rng(len(str(folder)) + len(part))
    ages = made.integers(20, 80, count)
    lines = [f"{age},{'ab'[n % 2]},{'yes' if age > 50 else 'no'}" for n, age in enumerate(ages)]
    (folder / f"{part}.csv").write_text("\n".join(["age,ward,ill", *lines]) + "\n")


def pictures(folder: Path, part: str, count: int) -> None:
    """Dark and bright squares."""
    made = np.random.default_rng(len(str(folder)) + len(part))
    for label, mean in (("dark", 60), ("bright", 190)):
        home = folder / part / label
        home.mkdir(parents=True)
        for number in range(count // 2):
            pixels = np.clip(made.normal(mean, 40, (8, 8)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(home / f"{number}.png")


def nothing(folder: Path, part: str, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)


SCHEMAS: dict[str, dict[str, Any]] = {
    "table": {
        "kind": "table",
        "columns": [
            {"kind": "numeric", "name": "age", "low": 20, "high": 80},
            {"kind": "categorical", "name": "ward", "categories": ["a", "b"]},
        ],
        "target": {"name": "ill", "classes": ["no", "yes"]},
    },
    "images": {
        "kind": "images",
        "labels": ["bright", "dark"],
        "height": 8,
        "width": 8,
        "colour": False,
    },
}
RINGS = "bract.simulations.examples.rings"
CASES: dict[str, tuple[str, str, Callable[[Path, str, int], None]]] = {
    "table": ("table", "linear", table),
    "images": ("images", "linear", pictures),
    "factory": (f"{RINGS}:data", f"{RINGS}:model", nothing),
}


def laid_out(root: Path, case: str, port: int) -> Layout:
    name, model, write = CASES[case]
    data: dict[str, Any] = {"name": name}
    if case in SCHEMAS:
        root.mkdir(parents=True)
        (root / "schema.toml").write_text(tomli_w.dumps(SCHEMAS[case]))
        data["schema_file"] = "../schema.toml"
    for part in ("validation", "test"):
        write(root / "public", part, PUBLIC)
    for site in SITES:
        write(root / "sites" / site / "own", "train", ROWS)
    return loopback.lay_out(
        root,
        sites=[
            SitePlan(
                site,
                ROWS,
                name,
                f"{place}/9" if case == "factory" else "1/1",
                data_folder=None if case == "factory" else str(root / "sites" / site / "own"),
                epsilon=30.0,
            )
            for place, site in enumerate(SITES, 1)
        ],
        port=port,
        public_data=None if case == "factory" else str(root / "public"),
        terms={
            "run": "own",
            "rounds": 4,
            "minimum_cohort": 2,
            "deadlines": {"sites": 60.0, "round": 60.0, "reply": 45.0, "close": 3.0},
            "model": {"name": model},
            "data": data,
            "training": {"local_steps": 10, "learning_rate": 2.0},
            "privacy": {
                "epsilon": 15.0,
                "delta": 1e-5,
                "clip_norm": 1.0,
                "batch": 60.0,
                "noise_multiplier": 1.2,
            },
        },
    )


@pytest.mark.parametrize("case", CASES)
def test_own_data_is_checked_trained_on_and_scored(
    tmp_path: Path, bract: Bract, forked: Callable[[Layout], Processes], case: str
) -> None:
    layout = laid_out(tmp_path / "federation", case, held_port())
    for site in SITES:
        checked = bract("client", str(layout.site(site)), "--check", str(layout.contract), "--json")
        said = json.loads(checked.stdout)
        assert (said["accepted"], said["problems"]) == (True, []), checked.stdout
    with forked(layout) as processes:
        processes.start_server()
        for site in SITES:
            processes.start_client(site)
        processes.wait_for_server(180)
    summary = canonical.decode((layout.out / "summary.json").read_bytes())
    assert (summary["rounds"], summary["refused"]) == (4, [])
    assert summary["test_accuracy"] > (0.45 if case == "factory" else 0.75)
    shown = bract("contract", "show", str(layout.contract)).stdout
    assert ("prepared " in shown) == (case in SCHEMAS)


def test_a_row_that_does_not_fit_is_named_before_a_site_joins(tmp_path: Path, bract: Bract) -> None:
    layout = laid_out(tmp_path / "federation", "table", port=1)
    path = tmp_path / "federation/sites/alpha/own/train.csv"
    path.write_text(path.read_text() + "7x31,a,no\n")
    checked = bract("client", str(layout.site("alpha")), "--check", str(layout.contract))
    assert checked.returncode == 1
    assert f"row {ROWS + 2}, column age: not a number" in checked.stdout + checked.stderr
    assert "7x31" not in checked.stdout + checked.stderr
