"""Which data a domain counts is fixed: a new name, a link or another cut is no new budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bract.client import holdings
from bract.client.holdings import Roots, bind, bindings
from bract.client.settings import DataRoot
from bract.shared import canonical
from bract.shared.data import Examples, describe, load_part
from bract.shared.data.shares import dealt, may_meet, share
from bract.shared.errors import Reason, Refusal, UsageError
from bract.shared.policy import DomainPolicy, Policy

KEY = "a" * 64
SAME = "count the same data"


def policy(**overlaps: tuple[str, ...]) -> Policy:
    domains = {
        name: DomainPolicy(epsilon=8.0, delta=1e-5, overlaps=shared)
        for name, shared in overlaps.items()
    }
    return Policy(site="alpha", coordinators=(KEY,), domains=domains, models=("linear",))


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "domains.json"


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ("one/inner", "two"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def root(folder: Path | str | None, part: str = "va", name: str = "heart-disease") -> DataRoot:
    return DataRoot(name=name, part=part, folder=None if folder is None else str(folder))


def test_a_binding_is_recorded_once_and_holds_from_then_on(folders: Path, record: Path) -> None:
    roots, allowed = {"ward": root(folders / "one")}, policy(ward=())
    bind(roots, allowed, record)
    written, changed_at = record.read_bytes(), record.stat().st_mtime_ns
    assert canonical.decode(written)["ward"]["folder"] == str(folders / "one")
    assert record.stat().st_mode & 0o777 == 0o600
    bind(roots, allowed, record)
    assert (record.read_bytes(), record.stat().st_mtime_ns) == (written, changed_at)


def test_a_renamed_domain_over_the_same_data_is_no_new_budget(folders: Path, record: Path) -> None:
    bind({"ward": root(folders / "one")}, policy(ward=()), record)
    before = record.read_bytes()
    with pytest.raises(UsageError, match=rf"'fresh' and 'ward' {SAME}"):
        bind({"fresh": root(folders / "one")}, policy(fresh=()), record)
    assert record.read_bytes() == before


@pytest.mark.parametrize("earlier", [True, False], ids=["one after another", "at once"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("one", "one"),
        ("one", "one/inner"),
        ("one/inner", "one"),
        ("one", "two/../one"),
        ("one", "link"),
        ("link/inner", "one"),
    ],
    ids=["itself", "inner", "outer", "round about", "a link", "through a link"],
)
def test_no_other_way_to_name_a_folder_is_another_budget(
    folders: Path, record: Path, first: str, second: str, earlier: bool
) -> None:
    (folders / "link").symlink_to(folders / "one")
    roots = {"ward": root(folders / first), "fresh": root(folders / second)}
    if earlier:
        bind({"ward": roots.pop("ward")}, policy(ward=()), record)
    allowed = policy(ward=(), fresh=())
    with pytest.raises(UsageError, match=f"{SAME} .* declare overlaps"):
        bind(roots, allowed, record)
    bind(roots, policy(ward=(), fresh=("ward",)), record)  # one use is charged to both


def test_other_folders_and_other_parts_are_other_data(folders: Path, record: Path) -> None:
    roots = {
        "ward": root(folders / "one", "va"),
        "clinic": root(folders / "one", "cleveland"),
        "garden": root(folders / "two", "va"),
        "digits": root(None, "1/2", "digits"),
        "images": root(None, "1/2", "fashion-mnist"),
        "others": root(None, "2/2", "digits"),
    }
    bind(roots, policy(**dict.fromkeys(roots, ())), record)
    assert set(canonical.decode(record.read_bytes())) == set(roots)


@pytest.mark.parametrize("second", ["1/4", "3/4", "01/02", "1/3", "1/1"])
def test_another_cut_of_the_same_data_is_no_new_budget(
    folders: Path, record: Path, second: str
) -> None:
    for folder, name in ((None, "digits"), (folders / "one", "fashion-mnist")):
        roots = {"ward": root(folder, "1/2", name), "fresh": root(folder, second, name)}
        with pytest.raises(UsageError, match=SAME):
            bind(roots, policy(ward=(), fresh=()), record)
        bind({**roots, "fresh": root(folder, "2/2", name)}, policy(ward=(), fresh=()), record)
        record.unlink()


def test_data_that_ship_with_a_library_are_the_same_under_any_folder(
    folders: Path, record: Path
) -> None:
    roots = {
        "ward": root(folders / "one", "1/2", "digits"),
        "fresh": root(folders / "two", "1/2", "digits"),
    }
    with pytest.raises(UsageError, match=SAME):
        bind(roots, policy(ward=(), fresh=()), record)


def test_data_found_by_their_name_may_be_those_that_another_domain_names(
    folders: Path, record: Path
) -> None:
    roots = {"ward": root(None, "va"), "fresh": root(folders / "one", "va")}
    with pytest.raises(UsageError, match=SAME):
        bind(roots, policy(ward=(), fresh=()), record)
    roots["fresh"] = root(folders / "one", "cleveland")
    bind(roots, policy(ward=(), fresh=()), record)


def test_data_that_moved_need_their_old_path_or_another_domain(folders: Path, record: Path) -> None:
    bind({"ward": root(folders / "one")}, policy(ward=()), record)
    for moved in (root(folders / "two"), root(folders / "one", "cleveland"), root(None)):
        with pytest.raises(UsageError, match=r"'ward' counted .*, part va and now names"):
            bind({"ward": moved}, policy(ward=()), record)
    bind({"ward": root(folders / "one"), "more": root(folders / "two")},
         policy(ward=(), more=()), record)  # fmt: skip


def test_an_earlier_domain_stays_bound_after_it_left_the_policy(
    folders: Path, record: Path
) -> None:
    both = {"ward": root(folders / "one"), "clinic": root(folders / "two")}
    bind(both, policy(ward=(), clinic=()), record)
    bind({"clinic": both["clinic"]}, policy(clinic=()), record)
    with pytest.raises(UsageError, match=SAME):
        bind({"third": both["ward"]}, policy(third=()), record)


def test_overlaps_reach_through_other_domains(folders: Path, record: Path) -> None:
    roots = {name: root(folders / "one") for name in ("ward", "clinic", "garden")}
    bind(roots, policy(ward=("clinic",), clinic=(), garden=("clinic",)), record)
    assert len(canonical.decode(record.read_bytes())) == 3


def test_asking_writes_nothing(folders: Path, record: Path) -> None:
    found = bindings({"ward": root(folders / "one")}, policy(ward=()), record)
    assert set(found) == {"ward"}
    assert not record.exists()


@pytest.mark.parametrize(
    "text", [b"", b"x", b"[]", b'{"ward":"one#va"}', b'{"ward":{"name":"digits"}}', b'{"ward": {}}']
)
def test_a_record_that_cannot_be_read_stops_the_site(
    folders: Path, record: Path, text: bytes
) -> None:
    record.write_bytes(text)
    with pytest.raises(UsageError, match="put it back from its backup") as stopped:
        bind({"ward": root(folders / "one")}, policy(ward=()), record)
    assert "\n" not in str(stopped.value)
    assert record.read_bytes() == text


# Shares of one data set


@given(st.data())
def test_shares_that_hold_a_common_example_are_said_to_meet(data: Any) -> None:
    numbered = Examples(inputs=np.arange(60), targets=np.arange(60))
    parts = []
    for _ in range(2):
        count = data.draw(st.integers(1, 60))
        parts.append(f"{data.draw(st.integers(1, count))}/{count}")
    for shared in (share, dealt):
        one, other = (set(shared(numbered, part).targets.tolist()) for part in parts)
        assert may_meet(*parts) == may_meet(*reversed(parts))
        if one & other:
            assert may_meet(*parts)
    one, other = (set(share(numbered, part).targets.tolist()) for part in parts)
    if not one & other and parts[0].partition("/")[2] == parts[1].partition("/")[2]:
        assert not may_meet(*parts)  # the shares of one cut are apart


@given(st.data())
def test_an_example_more_deals_no_other_to_another_share(data: Any) -> None:
    """Else it would move a whole sum, and take examples that a domain counted to another."""
    count, size = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 40))
    rows = np.arange(size + 1)
    persons = data.draw(st.sampled_from([None, rows // 3 + 2**62]))
    grown = Examples(inputs=rows[:, None] * 0.5, targets=rows % 3, persons=persons)
    gone = data.draw(st.integers(0, size))
    fewer = grown.take(np.delete(rows, gone))
    shares = [dealt(grown, f"{place}/{count}").inputs[:, 0] * 2 for place in range(1, count + 1)]
    assert sorted(np.concatenate(shares)) == list(rows)
    for place, held in enumerate(shares, 1):
        assert (dealt(fewer, f"{place}/{count}").inputs[:, 0] * 2).tolist() == [
            row for row in held if row != gone
        ]
    if persons is not None:
        whose = [{row // 3 for row in held} for held in shares]
        assert sum(map(len, whose)) == len(set().union(*whose))


def test_equal_examples_are_dealt_evenly_and_one_less_moves_none() -> None:
    alike = Examples(inputs=np.ones((300, 2)), targets=np.zeros(300, int))
    before = [len(dealt(alike, f"{place}/3")) for place in (1, 2, 3)]
    assert sum(before) == 300
    assert min(before) > 70
    after = [len(dealt(alike.take(np.arange(299)), f"{place}/3")) for place in (1, 2, 3)]
    assert sorted(one - two for one, two in zip(before, after, strict=True)) == [0, 0, 1]


def test_parts_by_name_meet_themselves_alone() -> None:
    assert may_meet("va", "va")
    assert not may_meet("va", "cleveland")
    for odd in ("0/0", "3/2", "1/2/3", "", "1/2 "):
        assert may_meet(odd, odd)
        assert not may_meet(odd, "1/2")


# What a gate asks of them


def test_a_contract_for_data_that_the_domain_does_not_hold_is_refused_and_none_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holdings, "load_part", None)  # reading would fail
    roots = Roots({"ward": root(None, "1/2", "digits")})
    terms = describe("digits")
    roots.check("ward", terms)
    roots.check("ward", terms.model_copy(update={"offset": 3.0, "scale": 2.0}))
    for domain, data in (
        ("clinic", terms),
        ("ward", describe("heart-disease")),
        ("ward", terms.model_copy(update={"name": "digit"})),
        ("ward", terms.model_copy(update={"shape": (8, 8)})),
        ("ward", terms.model_copy(update={"shape": (1, 8, 9)})),
        ("ward", terms.model_copy(update={"classes": 9})),
    ):
        with pytest.raises(Refusal) as refused:
            roots.check(domain, data)
        assert refused.value.reason is Reason.POLICY_DOMAIN


@pytest.mark.parametrize(
    ("name", "lies"),
    [
        ("heart-disease", ""),
        ("table", "train.csv"),
        ("images", "train"),
        ("arrays", "train.npz"),
        ("hub", "train.parquet"),
        ("text", "train.jsonl"),
    ],
)
def test_data_that_are_not_in_their_place_are_refused_for_now_and_found_when_they_are_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lies: str
) -> None:
    monkeypatch.setattr(holdings, "load_part", None)  # reading would fail
    monkeypatch.setattr(holdings.dataset(name).__class__, "fits", lambda self, terms: True)
    folder = tmp_path / "data"
    roots = Roots({"ward": root(folder, "1/1", name)})
    terms = describe("digits").model_copy(update={"name": name})
    if lies:
        folder.mkdir()  # where a disk is mounted, without the disk
    with pytest.raises(Refusal, match=r"domains\.ward\.data of SITE\.toml") as refused:
        roots.check("ward", terms)
    assert not refused.value.reason.final
    assert str(folder / lies) in str(refused.value)
    (folder / lies).mkdir(parents=True)
    roots.check("ward", terms)


def test_nothing_is_charged_while_the_data_are_not_there(world: Any, tmp_path: Path) -> None:
    agreed = world.contract(data=describe("heart-disease"))
    roots = Roots({"ward": root(tmp_path / "gone", "va")})
    gate, order = replace(world.gate(), holdings=roots), world.order(world.sign(agreed))
    with pytest.raises(Refusal) as refused:
        gate.admit(order)
    assert refused.value.reason is Reason.SITE_FAILED
    with gate.ledger.transaction() as transaction:
        assert transaction.chain("alpha", "ward", key=world.key.public).genesis is None


def test_what_cannot_be_opened_is_told_by_its_key_in_the_sites_file(tmp_path: Path) -> None:
    roots = Roots({"ward": root(tmp_path, "va")})  # a folder without the hospital's file
    with pytest.raises(UsageError, match=r"domains\.ward\.data of SITE\.toml: .*domains\.NAME"):
        roots.open("ward", describe("heart-disease"))


def test_the_data_of_a_domain_are_its_own_part() -> None:
    roots = Roots({"ward": root(None, "2/3", "digits")})
    found, expected = (
        roots.open("ward", describe("digits")),
        load_part(describe("digits"), None, "2/3"),
    )
    np.testing.assert_array_equal(found.inputs, expected.inputs)
    assert roots.problems("ward", describe("digits"), 433) == []
    (short,) = roots.problems("ward", describe("digits"), 434)
    assert "fewer rows than the nominal size 434" in short
    (absent,) = Roots({"ward": root("/nowhere")}).problems("ward", describe("heart-disease"), 1)
    assert "nowhere" in absent
