"""Objects from a stranger: bounded before they are inflated, and a message or nothing after."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import numpy as np
import pytest
from attack_helpers import message, objects_of, raw_object
from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from hypothesis import given
from hypothesis import strategies as st

from bract.shared import flower, packing
from bract.shared.errors import VerificationFailed
from bract.shared.flower import GREATEST_TREE, GrewTooLarge

ROOM = 2**24
VALUES = {"a": np.arange(6, dtype=np.float32), "b": np.zeros(6, dtype=np.float32)}
CONTENT = RecordDict({"weights": packing.pack(VALUES), "order": ConfigRecord({"round": 1})})


def whole() -> tuple[str, dict[str, bytes]]:
    return objects_of(message(CONTENT))


def test_a_message_comes_back_as_it_was_and_its_objects_are_taken_out() -> None:
    sent = message(CONTENT)
    root, objects = objects_of(sent)
    assert set(flower.parts(get_object_tree(sent))) == set(objects)
    read = flower.inflate(root, objects, greatest=ROOM)
    assert dict(read.content) == dict(CONTENT)
    assert objects == {}


def test_the_bound_is_on_what_it_grows_to() -> None:
    root, objects = whole()
    size = sum(map(len, objects.values()))
    flower.inflate(root, dict(objects), greatest=size)
    with pytest.raises(GrewTooLarge):
        flower.inflate(root, dict(objects), greatest=size - 1)


def bomb(chunks: int, names: int, records: int) -> tuple[str, dict[str, bytes]]:
    """A chunk of a megabyte, as often as is said at each level."""
    chunk, data = raw_object("ArrayChunk", [], bytes(2**20))
    said = {"dtype": "float32", "shape": [1], "stype": "x", "arraychunk_ids": [0] * chunks}
    one, one_data = raw_object("Array", [chunk], json.dumps(said).encode())
    held = json.dumps({str(n): one for n in range(names)}).encode()
    record, record_data = raw_object("ArrayRecord", [one], held)
    listed = json.dumps({str(n): record for n in range(records)}).encode()
    content, content_data = raw_object("RecordDict", [record], listed)
    root, root_data = raw_object("Message", [content], b"")
    return root, {chunk: data, one: one_data, record: record_data, content: content_data,
                  root: root_data}  # fmt: skip


@pytest.mark.parametrize("times", [(10**6, 1, 1), (1, 10**4, 1), (1, 1, 10**4), (30, 30, 30)])
def test_what_is_named_often_counts_as_often(times: tuple[int, int, int]) -> None:
    with pytest.raises(GrewTooLarge):
        flower.inflate(*bomb(*times), greatest=ROOM)


def test_a_chain_deeper_than_a_stack_is_refused() -> None:
    name, data = raw_object("RecordDict", [], b"{}")
    objects = {name: data}
    for _ in range(5000):
        name, data = raw_object("RecordDict", [name], json.dumps({"x": name}).encode())
        objects[name] = data
    root, objects[root] = raw_object("Message", [name], b"")
    with pytest.raises(VerificationFailed):
        flower.inflate(root, objects, greatest=ROOM)


def test_an_order_and_an_answer_hold_no_other_kinds() -> None:
    kinds = {
        "metrics": RecordDict({"m": MetricRecord({"n": 1})}),
        "nothing": RecordDict({"a": ArrayRecord()}),
    }
    with pytest.raises(VerificationFailed, match="another kind"):
        flower.inflate(*objects_of(message(kinds["metrics"])), greatest=ROOM)
    flower.inflate(*objects_of(message(kinds["nothing"])), greatest=ROOM)
    error = make_message(metadata=message(RecordDict()).metadata, error=Error(1, "x"))
    with pytest.raises(VerificationFailed, match="without content"):
        flower.inflate(*objects_of(error), greatest=ROOM)
    for name in objects_of(message(CONTENT))[1]:
        if name != whole()[0]:
            with pytest.raises(VerificationFailed):
                flower.inflate(name, whole()[1], greatest=ROOM)


@given(place=st.integers(0, 10**6), junk=st.binary(max_size=40), cut=st.booleans())
def test_any_damage_is_a_verification_that_failed(place: int, junk: bytes, cut: bool) -> None:
    root, objects = whole()
    name = sorted(objects)[place % len(objects)]
    data = objects[name]
    at = place % (len(data) + 1)
    objects[name] = data[:at] + junk if cut else data[:at] + junk + data[at + len(junk) :]
    try:
        flower.inflate(root, objects, greatest=ROOM)
    except VerificationFailed:
        return


def test_a_missing_object_is_a_verification_that_failed() -> None:
    root, every = whole()
    for name in every:
        objects = {other: data for other, data in every.items() if other != name}
        with pytest.raises(VerificationFailed):
            flower.inflate(root, objects, greatest=ROOM)


def tree(name: str, *children: Any) -> ObjectTree:
    return ObjectTree(object_id=name, children=children)


def test_a_tree_has_bounds_and_names() -> None:
    names = [f"{n:064x}" for n in range(GREATEST_TREE)]
    most = tree(names[0], *map(tree, names[1:]))
    assert set(flower.parts(most)) == set(names)
    with pytest.raises(GrewTooLarge):
        flower.parts(tree(names[0], *map(tree, [*names[1:], "f" * 64])))
    for bad in ("", "F" * 64, "0x" + "f" * 62, "../" + "f" * 61, "f" * 63, "f" * 64 + "\n"):
        with pytest.raises(VerificationFailed):
            flower.parts(tree("f" * 64, tree(bad)))


def test_a_tree_that_repeats_is_a_list_of_its_names() -> None:
    names = [f"{n:064x}" for n in range(60)]
    steps = [tree(after, tree(before), tree(before)) for before, after in itertools.pairwise(names)]
    assert set(flower.parts(tree("f" * 64, *steps))) == {*names, "f" * 64}


def test_a_broad_tree_is_refused_before_it_is_walked() -> None:
    broad = ObjectTree.FromString(b"\x0a\x40" + b"f" * 64 + b"\x12\x00" * 2_000_000)
    began = time.process_time()
    with pytest.raises(GrewTooLarge):
        flower.parts(broad)
    assert time.process_time() - began < 5
