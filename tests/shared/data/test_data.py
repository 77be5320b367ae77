"""Data sets, where they are found, and how sites share them."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bract.shared import data
from bract.shared.data import Examples, Groups, locations
from bract.shared.data.fashion_mnist import SOURCE, load_fashion_mnist
from bract.shared.data.locations import Source, content, download, folder_of, located
from bract.shared.data.partitions import Partition, group_names, nominal_size, split
from bract.shared.data.shares import faults, share
from bract.shared.errors import UnknownName, UsageError

# flwr-datasets' advice names options of its own
pytestmark = [
    pytest.mark.filterwarnings("ignore:Classes. .* will NOT be used:UserWarning"),
    pytest.mark.filterwarnings("ignore:The specified min_partition_size:UserWarning"),
]
CONTENT = {"images": b"some pixels" * 50, "labels": b"0123456789"}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Source]:
    """A data set of two files, served on the loopback, packed and as they are."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name, plain in CONTENT.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(plain, mtime=0))
        (folder / name).write_bytes(plain)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Source(
            name="made-up",
            base=f"http://127.0.0.1:{server.server_port}/",
            sha256={name: hashlib.sha256(c).hexdigest() for name, c in CONTENT.items()},
        )
        server.shutdown()
        thread.join()


def test_unknown_data_set_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'digits'"):
        data.dataset("digit")


def test_digits_are_split_once_and_for_all_into_disjoint_parts() -> None:
    splits = data.load(data.describe("digits"), None)
    parts = [splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts] == [1300, 137, 360]
    terms = data.describe("digits")
    for part in parts:
        assert part.inputs.shape[1:] == terms.shape
        assert part.inputs.dtype == np.uint8
        assert part.inputs.max() <= terms.scale
        assert set(part.targets) == set(range(terms.classes))
    from sklearn.datasets import load_digits

    bundle = load_digits()
    everything = sorted(
        (image.tobytes(), int(target))
        for part in parts
        for image, target in zip(part.inputs, part.targets, strict=True)
    )
    published = zip(bundle.images.astype(np.uint8), bundle.target, strict=True)
    assert everything == sorted((image.tobytes(), int(target)) for image, target in published)
    again = data.dataset("digits").load(data.describe("digits"), None)
    np.testing.assert_array_equal(again.test.inputs, splits.test.inputs)


@pytest.mark.parametrize("count", [1, 2, 7, 1300])
def test_shares_hold_every_training_example_once_and_are_even(count: int) -> None:
    train = data.load(data.describe("digits"), None).train
    if count < 10:  # as a site loads them; each load reads all of the data anew
        names = [f"{i}/{count}" for i in range(1, count + 1)]
        shares = [data.load_part(data.describe("digits"), None, name) for name in names]
    else:
        shares = [share(train, f"{i}/{count}") for i in range(1, count + 1)]
    assert {len(part) for part in shares} <= {1300 // count, 1300 // count + 1}

    def content(examples: Examples) -> list[tuple[bytes, int]]:
        return [
            (x.tobytes(), int(y)) for x, y in zip(examples.inputs, examples.targets, strict=True)
        ]

    together = sorted(pair for part in shares for pair in content(part))
    assert together == sorted(content(train))


def test_shares_are_shuffled_alike_for_every_site() -> None:
    one, again = (data.load_part(data.describe("digits"), None, "2/3") for _ in range(2))
    np.testing.assert_array_equal(one.inputs, again.inputs)
    train = data.load(data.describe("digits"), None).train
    assert not np.array_equal(one.targets, train.targets[1::3])


@pytest.mark.parametrize("part", ["", "3", "0/3", "4/3", "1/1301", "-1/3", "1/3/4", "a/b", "1/0"])
def test_part_that_is_no_share_is_an_error(part: str) -> None:
    with pytest.raises(UsageError, match=r"must be i/n, .* n up to 1300"):
        data.load_part(data.describe("digits"), None, part)


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "heart-disease"])
def test_server_and_simulation_hold_the_same_public_examples(
    name: str, request: pytest.FixtureRequest
) -> None:
    folder = None
    if name == "fashion-mnist":
        folder = request.getfixturevalue("data_root") / name
    if name == "heart-disease":
        folder = request.getfixturevalue("hospitals")
    splits = data.load(data.describe(name), folder)
    public = data.load_public(data.describe(name), folder)
    for one, other in zip(public, (splits.validation, splits.test), strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)
        np.testing.assert_array_equal(one.targets, other.targets)


def test_server_and_site_of_fashion_mnist_open_only_their_own_files(
    data_root: Path, tmp_path: Path
) -> None:
    for part in ("train", "t10k"):
        (tmp_path / part).mkdir()
        for path in (data_root / "fashion-mnist").glob(f"{part}-*"):
            (tmp_path / part / path.name).symlink_to(path)
    assert len(data.load_public(data.describe("fashion-mnist"), tmp_path / "t10k")[1]) == 8000
    assert len(data.load_part(data.describe("fashion-mnist"), tmp_path / "train", "3/10")) == 6000
    with pytest.raises(UsageError, match="no readable train-images"):
        data.load_part(data.describe("fashion-mnist"), tmp_path / "t10k", "3/10")


def test_check_names_too_few_rows_and_nothing_else() -> None:
    assert data.check_part(data.describe("digits"), None, "1/5", 260) == []
    (problem,) = data.check_part(data.describe("digits"), None, "1/5", 270)
    assert "digits 1/5: fewer rows than the nominal size 270" in problem
    assert "260" not in problem


def test_check_names_examples_that_would_add_nothing_without_their_values() -> None:
    inputs = np.full((4, 1, 2, 2), 0.125)
    inputs[1, 0, 1, 0], inputs[2, 0, 0, 0] = np.nan, np.inf
    examples = Examples(inputs=inputs, targets=np.array([0, 1, 1, 77]))
    assert faults(examples, classes=2, where="here") == [
        "here, example 2: value not finite",
        "here, example 3: value not finite",
        "here, example 4: unknown label",
    ]


def test_fashion_mnist_is_read_from_a_folder(data_root: Path) -> None:
    splits = load_fashion_mnist(data_root / "fashion-mnist")
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [60_000, 2000, 8000]
    assert splits.train.inputs.shape[1:] == (1, 28, 28)
    assert np.bincount(splits.train.targets).tolist() == [6000] * 10
    terms = data.describe("fashion-mnist")
    assert splits.train.inputs.mean() == pytest.approx(terms.offset, abs=0.01)
    assert splits.train.inputs.std() == pytest.approx(terms.scale, abs=0.01)


def test_file_that_is_not_the_published_one_is_refused(tmp_path: Path) -> None:
    for name in SOURCE.sha256:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x01\0", mtime=0))
    with pytest.raises(UsageError, match="is not the published file"):
        load_fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    "content", [None, b"no gzip at all", gzip.compress(b"cut off", mtime=0)[:-9]]
)
def test_unreadable_file_is_named_with_a_remedy(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(UsageError, match=r"train-images-idx3-ubyte.*correct data\.dir,"):
        load_fashion_mnist(tmp_path)


def test_download_keeps_the_files_and_needs_no_second_one(
    published: Source, tmp_path: Path
) -> None:
    folder = download(published, tmp_path / "cache" / "made-up")
    kept = {path.name: gzip.decompress(path.read_bytes()) for path in folder.iterdir()}
    assert kept == {f"{name}.gz": content for name, content in CONTENT.items()}
    gone = Source(name=published.name, base="http://127.0.0.1:9/", sha256=published.sha256)
    assert download(gone, folder) == folder


def test_files_that_are_published_as_they_are_are_kept_as_they_are(
    published: Source, tmp_path: Path
) -> None:
    source = replace(published, suffix="")
    folder = download(source, tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT
    assert {name: content(source, folder, name) for name in CONTENT} == CONTENT
    wrong = replace(source, sha256={"labels": "0" * 64})
    with pytest.raises(UsageError, match=r"labels is not the published file: nothing was kept"):
        download(wrong, tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_another_known_edition_is_taken_where_it_lies_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(CONTENT["labels"])
    source = Source("made-up", "http://127.0.0.1:9/", {"labels": "0" * 64})
    with pytest.raises(UsageError, match="labels is not the published file"):
        content(source, tmp_path, "labels")
    known = {"labels": hashlib.sha256(CONTENT["labels"]).hexdigest()}
    assert content(replace(source, reissued=known), tmp_path, "labels") == CONTENT["labels"]


def test_download_of_another_content_is_refused_and_not_kept(
    published: Source, tmp_path: Path
) -> None:
    wrong = {**published.sha256, "labels": "0" * 64}
    with pytest.raises(UsageError, match=r"labels\.gz is not the published file"):
        download(Source(published.name, published.base, wrong), tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["images.gz"]


@pytest.mark.parametrize("missing", ["host", "file", "gzip"])
def test_failed_download_says_how_to_go_on_without_one(
    published: Source, tmp_path: Path, missing: str
) -> None:
    base, names = published.base, dict(published.sha256)
    if missing == "host":
        base = "http://127.0.0.1:9/"
    if missing == "file":
        names = {"absent": "0" * 64}
    if missing == "gzip":
        (tmp_path / "published/images.gz").write_bytes(b"no gzip")
    with pytest.raises(UsageError, match=r"cannot be fetched .* --data-dir or BRACT_DATA"):
        download(Source(published.name, base, names), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_located_prefers_the_systems_folder_and_else_downloads_to_the_cache(
    published: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locations, "SYSTEM_ROOT", tmp_path / "system")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert located(published) == tmp_path / "cache/bract/made-up"
    assert len(list((tmp_path / "cache/bract/made-up").iterdir())) == 2
    (tmp_path / "system/made-up").mkdir(parents=True)
    assert located(published) == tmp_path / "system/made-up"


def test_folder_is_the_named_one_then_the_root_then_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("named", "root/digits", "environment/digits", "empty"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("BRACT_DATA", str(tmp_path / "environment"))
    ask = partial(folder_of, "digits")
    assert ask(folder=tmp_path / "named", root=tmp_path / "root") == tmp_path / "named"
    assert ask(folder=None, root=tmp_path / "root") == tmp_path / "root/digits"
    assert ask(folder=None, root=tmp_path / "empty") is None
    assert ask(folder=None, root=None) == tmp_path / "environment/digits"
    monkeypatch.delenv("BRACT_DATA")
    assert ask(folder=None, root=None) is None


@pytest.mark.parametrize(("option", "remedy"), [("folder", "data.dir"), ("root", "--data-dir")])
def test_named_folder_that_does_not_exist_is_an_error(
    tmp_path: Path, option: str, remedy: str
) -> None:
    places = {"folder": None, "root": None, option: tmp_path / "absent"}
    with pytest.raises(UsageError, match=f"no data folder .*absent: correct {remedy}"):
        folder_of("digits", **places)


TARGETS = np.random.default_rng(2).permutation(np.repeat(np.arange(10), 120))
PARTITIONS = {
    "iid": Partition(),
    "dirichlet": Partition(kind="dirichlet", alpha=0.5),
    "label": Partition(kind="label", labels_per_site=9),
    "sizes": Partition(kind="sizes"),
}


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("sites", [2, 5, 8])
def test_partition_gives_every_example_to_one_site(kind: str, sites: int) -> None:
    parts = split(TARGETS, sites=sites, partition=PARTITIONS[kind], seed=4)
    assert len(parts) == sites
    rows = np.concatenate(parts)
    assert len(set(rows)) == len(rows)
    assert set(rows) == set(range(len(TARGETS)))
    assert all(np.array_equal(part, np.sort(part)) for part in parts)


@pytest.mark.parametrize("sites", [1, 7, 50])
def test_an_even_partition_is_cut_as_flwr_datasets_cuts_it(sites: int) -> None:
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    order = np.random.default_rng(4).permutation(len(TARGETS))
    partitioner = IidPartitioner(num_partitions=sites)
    partitioner.dataset = Dataset.from_dict({"row": order.tolist()})
    parts = split(TARGETS, sites=sites, partition=Partition(), seed=4)
    for place, part in enumerate(parts):
        assert part.tolist() == sorted(partitioner.load_partition(place)["row"])


def test_partition_kinds_differ_in_sizes_and_labels() -> None:
    parts = {k: split(TARGETS, sites=5, partition=p, seed=4) for k, p in PARTITIONS.items()}
    sizes = {kind: [len(part) for part in of] for kind, of in parts.items()}
    assert sizes["iid"] == [240] * 5
    assert sizes["sizes"] == [80, 160, 240, 320, 400]
    assert [len(set(TARGETS[part])) for part in parts["label"]] == [9] * 5
    assert [len(set(TARGETS[part])) for part in parts["iid"]] == [10] * 5
    assert len(set(sizes["dirichlet"])) > 1

    def skew(of: list[np.ndarray]) -> float:
        shares = np.stack([np.bincount(TARGETS[p], minlength=10) / len(p) for p in of])
        return float(shares.std(0).mean())

    assert skew(parts["dirichlet"]) > 3 * skew(parts["iid"])


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "sizes"])
def test_partition_follows_its_seed(kind: str) -> None:
    one, again, other = (
        split(TARGETS, sites=4, partition=PARTITIONS[kind], seed=seed) for seed in (1, 1, 2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("sites", [0, 121])
def test_sites_that_the_examples_cannot_serve_are_an_error(sites: int) -> None:
    with pytest.raises(UsageError, match="use 1 to 120 sites"):
        split(TARGETS, sites=sites, partition=Partition(), seed=1)


@pytest.mark.parametrize(
    "partition",
    [
        Partition(kind="sizes", min_size=100),
        Partition(kind="dirichlet", alpha=0.001, min_size=100),
    ],
)
def test_partition_that_cannot_be_made_is_an_error(partition: Partition) -> None:
    with pytest.raises(UsageError, match=f"partition '{partition.kind}'"):
        split(TARGETS, sites=8, partition=partition, seed=1)


GROUPS = Groups(("north", "east", "south"), np.arange(len(TARGETS)) % 4 % 3)
NATURAL = Partition(kind="natural")


def test_natural_partition_leaves_the_groups_as_they_are() -> None:
    parts = split(TARGETS, sites=3, partition=NATURAL, seed=1, groups=GROUPS)
    assert [len(part) for part in parts] == [600, 300, 300]
    for place, part in enumerate(parts):
        np.testing.assert_array_equal(part, np.flatnonzero(GROUPS.index == place))
    assert group_names(GROUPS, sites=3, partition=NATURAL) == ("north", "east", "south")


def test_natural_partition_of_chosen_groups_keeps_their_order() -> None:
    partition = Partition(kind="natural", only=("south", "north"))
    assert group_names(GROUPS, sites=2, partition=partition) == ("north", "south")
    parts = split(TARGETS, sites=2, partition=partition, seed=1, groups=GROUPS)
    assert [set(GROUPS.index[part]) for part in parts] == [{0}, {2}]


def test_natural_partition_leaves_out_small_groups_where_it_is_asked_to() -> None:
    partition = Partition(kind="natural", min_size=301, drop_small=True)
    assert group_names(GROUPS, sites=1, partition=partition) == ("north",)
    (part,) = split(TARGETS, sites=1, partition=partition, seed=1, groups=GROUPS)
    np.testing.assert_array_equal(part, np.flatnonzero(GROUPS.index == 0))
    with pytest.raises(UsageError, match="set sites to 1"):
        group_names(GROUPS, sites=3, partition=partition)


@pytest.mark.parametrize("kind", ["dirichlet", "label"])
def test_data_without_labels_are_not_shared_by_labels(kind: Any) -> None:
    tokens = np.zeros((40, 8), dtype=np.int64)
    with pytest.raises(UsageError, match="goes by labels, and these data have none"):
        split(tokens, sites=2, partition=Partition(kind=kind), seed=1)
    parts = split(tokens, sites=2, partition=Partition(), seed=1)
    assert sorted(np.concatenate(parts)) == list(range(40))


@pytest.mark.parametrize(
    ("changes", "sites", "groups", "remedy"),
    [
        ({}, 4, GROUPS, "makes 3 sites of these data, not 4: set sites to 3"),
        ({}, 2, GROUPS, "makes 3 sites of these data, not 2: set sites to 3"),
        ({"only": ("east",)}, 3, GROUPS, "makes 1 sites of these data, not 3: set sites to 1"),
        ({"only": ("eest",)}, 1, GROUPS, "unknown group .* 'eest': did you mean 'east'"),
        ({}, 3, None, "no groups of its own: set data.partition.kind to iid"),
        ({"min_size": 301}, 3, GROUPS, "leaves a site under 301 examples"),
    ],
    ids=["more", "fewer", "sites-of-only", "unknown", "no-groups", "too-small"],
)
def test_natural_partition_that_cannot_be_made_is_an_error(
    changes: dict[str, Any], sites: int, groups: Groups | None, remedy: str
) -> None:
    partition = Partition(kind="natural", **changes)
    with pytest.raises(UsageError, match=remedy):
        split(TARGETS, sites=sites, partition=partition, seed=1, groups=groups)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"only": ("east",)}, "which the kind 'iid' has not"),
     ({"drop_small": True}, "which the kind 'iid' has not"),
     ({"kind": "natural", "only": ("east", "east")}, "name each once")],
    ids=["other-kind", "small", "twice"],
)  # fmt: skip
def test_only_names_groups_of_a_natural_partition_once(fields: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Partition(**fields)


def test_examples_keep_their_groups_when_taken() -> None:
    examples = Examples(inputs=TARGETS[:, None], targets=TARGETS, groups=GROUPS)
    rows = np.array([5, 2, 7])
    taken = examples.take(rows).groups
    assert taken is not None
    np.testing.assert_array_equal(taken.index, GROUPS.index[rows])
    assert {name: list(of) for name, of in taken.rows().items()} == {
        "north": [2], "east": [0], "south": [1]
    }  # fmt: skip


@pytest.mark.parametrize("labels_per_site", [2, 20])
def test_a_partition_by_label_never_leaves_labels_at_no_site(labels_per_site: int) -> None:
    partition = Partition(kind="label", labels_per_site=labels_per_site)
    with pytest.raises(UsageError, match="labels_per_site to 3 or more, 10 at the most"):
        split(TARGETS, sites=8, partition=partition, seed=1)


@pytest.mark.parametrize(
    ("true", "public"),
    [
        (1, 1),
        (10, 10),
        (99, 99),
        (100, 100),
        (109, 100),
        (260, 260),
        (5987, 5900),
        (60_000, 60_000),
    ],
)
def test_nominal_size_is_two_digits_rounded_down(true: int, public: int) -> None:
    assert nominal_size(true) == public
