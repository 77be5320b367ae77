from __future__ import annotations

import io
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from bract.shared import arrays, keys, wire
from bract.shared.contract import SignedContract
from bract.shared.errors import Reason, VerificationFailed
from bract.shared.messages import RefusalReply, TrainOrder, TrainReply
from bract.shared.privacy.receipts import Receipt
from bract.shared.updates import ProtectedUpdate, UnprotectedUpdate

KEY = keys.generate()
VALUES = {
    "layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layer.bias": np.array([1e-45, -0.0], dtype=np.float32),
    "scale": np.float32(3.5).reshape(()),
    "none": np.zeros((0, 4), dtype=np.float32),
}


@pytest.fixture
def signed(world: Any) -> SignedContract:
    return world.sign(world.contract())


def reply(update: type = ProtectedUpdate, **changes: Any) -> TrainReply:
    receipt = Receipt(
        contract="c" * 64,
        site="alpha",
        round=3,
        attempt=1,
        update=arrays.digest(VALUES),
        head_domain="ward",
        head_sequence=7,
        head_hash="d" * 64,
    )
    receipt = replace(receipt, **changes)
    return TrainReply(update=update(VALUES), receipt=receipt, signature=KEY.sign(receipt.digest()))


def same(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].tobytes() == other[name].tobytes()
        for name in other
    )


def raw(**changes: Any) -> FlowerArray:
    value = {
        "dtype": "float32",
        "shape": (2,),
        "stype": "numpy.ndarray.raw",
        "data": bytes(8),
        **changes,
    }
    return FlowerArray(**value)


def test_a_train_order_survives_the_wire(signed: SignedContract) -> None:
    order = TrainOrder(contract=signed, round=4, weights=VALUES)
    again = wire.decode_order(wire.encode_order(order))
    assert (again.contract, again.round) == (signed, 4)
    assert same(again.weights, VALUES)


@pytest.mark.parametrize("update", [ProtectedUpdate, UnprotectedUpdate])
def test_an_update_keeps_its_kind_its_bits_and_its_receipt(update: type) -> None:
    sent = reply(update)
    again = wire.decode_reply(wire.encode_reply(sent))
    assert isinstance(again, TrainReply)
    assert type(again.update) is update
    assert same(again.update.arrays, VALUES)
    assert (again.receipt, again.signature) == (sent.receipt, sent.signature)
    again.verify(KEY.public)


def test_what_was_decoded_shares_no_memory_with_what_was_sent(signed: SignedContract) -> None:
    weights = {"w": np.zeros(3, dtype=np.float32)}
    content = wire.encode_order(TrainOrder(contract=signed, round=1, weights=weights))
    decoded = wire.decode_order(content)
    weights["w"][:] = 1
    assert decoded.weights["w"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        decoded.weights["w"][:] = 2


@pytest.mark.parametrize("reason", list(Reason))
def test_a_refusal_carries_site_round_and_reason_and_nothing_else(reason: Reason) -> None:
    content = wire.encode_refusal(RefusalReply(site="alpha", round=2, reason=reason))
    assert {name: dict(record) for name, record in content.items()} == {
        "refusal": {"site": "alpha", "round": 2, "reason": reason.value}
    }
    assert wire.decode_reply(content) == RefusalReply(site="alpha", round=2, reason=reason)
    assert not any(character.isdigit() for character in reason.value)


@pytest.mark.parametrize("field", list(Receipt.__dataclass_fields__))
def test_a_receipt_changed_in_any_field_does_not_verify(field: str) -> None:
    sent = reply()
    old = getattr(sent.receipt, field)
    receipt = replace(sent.receipt, **{field: old + 1 if isinstance(old, int) else f"{old}0"})
    with pytest.raises(VerificationFailed):
        replace(sent, receipt=receipt).verify(KEY.public)


def test_a_reply_with_another_update_or_by_another_key_does_not_verify() -> None:
    sent, others = reply(), {**VALUES, "scale": np.float32(3.25).reshape(())}
    sent.verify(KEY.public)
    with pytest.raises(VerificationFailed, match="another update"):
        replace(sent, update=ProtectedUpdate(others)).verify(KEY.public)
    with pytest.raises(VerificationFailed):
        sent.verify(keys.generate().public)


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        raw(stype="numpy.ndarray"),
        raw(stype=""),
        raw(stype="numpy.ndarray", dtype="object", shape=(1,), data=pickled()),
        raw(dtype="object", shape=(1,), data=pickle.dumps({"a": 1})),
        raw(dtype="float64"),
        raw(dtype="float64", data=bytes(16)),
        raw(dtype=">f4"),
        raw(dtype="int32"),
        raw(data=bytes(7)),
        raw(data=bytes(12)),
        raw(data=b""),
        raw(shape=(3,)),
        raw(shape=()),
        raw(shape=(-2,)),
        raw(shape=(-1, -2)),
        raw(shape=(0, -1), data=b""),
        raw(shape=(2**32, 2**32), data=b""),
        raw(shape=(2**62, 2), data=b""),
        raw(shape=(0, 2**64), data=b""),
        raw(shape=(1,) * 80, data=bytes(4)),
    ],
    ids=lambda array: f"{array.stype}-{array.dtype}-{array.shape[:3]}-{len(array.data)}",
)
def test_an_array_that_is_not_raw_float32_of_its_shape_is_refused(
    array: FlowerArray, signed: SignedContract
) -> None:
    order = wire.encode_order(TrainOrder(contract=signed, round=1, weights={}))
    order["weights"] = ArrayRecord({"w": array})
    answer = wire.encode_reply(reply())
    answer["update"] = ArrayRecord({"w": array})
    with pytest.raises(VerificationFailed):
        wire.decode_order(order)
    with pytest.raises(VerificationFailed):
        wire.decode_reply(answer)


def config(record: ConfigRecord, **changes: Any) -> ConfigRecord:
    """Returns a record with fields changed, or left out where the value is None."""
    values = {**dict(record), **changes}
    return ConfigRecord({name: value for name, value in values.items() if value is not None})


@pytest.mark.parametrize(
    "changes",
    [
        {"contract": None},
        {"round": None},
        {"round": "1"},
        {"round": 1.0},
        {"round": True},
        {"round": [1]},
        {"contract": "{}"},
        {"contract": b"{}"},
        {"contract": b"{"},
        {"contract": b""},
        {"epsilon": 3.0},
    ],
)
def test_an_order_of_any_other_form_is_refused(
    changes: dict[str, Any], signed: SignedContract
) -> None:
    content = wire.encode_order(TrainOrder(contract=signed, round=1, weights=VALUES))
    content["order"] = config(content["order"], **changes)
    with pytest.raises(VerificationFailed):
        wire.decode_order(content)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in (*Receipt.__dataclass_fields__, "signature")),
        {"round": "3"},
        {"attempt": True},
        {"head_sequence": 7.0},
        {"site": 1},
        {"signature": "00"},
        {"loss": 0.25},
    ],
)
def test_a_receipt_of_any_other_form_is_refused(changes: dict[str, Any]) -> None:
    content = wire.encode_reply(reply())
    content["receipt"] = config(content["receipt"], **changes)
    with pytest.raises(VerificationFailed):
        wire.decode_reply(content)


@pytest.mark.parametrize(
    "changes",
    [
        {"site": None},
        {"round": None},
        {"reason": None},
        {"reason": "tired"},
        {"reason": 3},
        {"round": 2.0},
        {"epsilon": 3.2},
    ],
)
def test_a_refusal_of_any_other_form_is_refused(changes: dict[str, Any]) -> None:
    content = wire.encode_refusal(RefusalReply("alpha", 2, Reason.SITE_FAILED))
    content["refusal"] = config(content["refusal"], **changes)
    with pytest.raises(VerificationFailed):
        wire.decode_reply(content)


@pytest.mark.parametrize("extra", [MetricRecord({"loss": 0.5}), ConfigRecord({}), ArrayRecord()])
def test_a_message_with_a_further_record_is_refused(extra: Any, signed: SignedContract) -> None:
    order = wire.encode_order(TrainOrder(contract=signed, round=1, weights=VALUES))
    answers = [
        wire.encode_reply(reply()),
        wire.encode_reply(reply(UnprotectedUpdate)),
        wire.encode_refusal(RefusalReply("alpha", 2, Reason.SITE_FAILED)),
    ]
    for content in (order, *answers):
        content["metrics"] = extra
        with pytest.raises(VerificationFailed):
            (wire.decode_order if content is order else wire.decode_reply)(content)


def test_an_update_under_both_keys_is_refused() -> None:
    content = wire.encode_reply(reply())
    content["unprotected-update"] = content["update"]
    with pytest.raises(VerificationFailed):
        wire.decode_reply(content)


@pytest.mark.parametrize("record", [ConfigRecord({"w": b""}), MetricRecord({"w": 1.0})])
def test_arrays_are_taken_from_an_array_record_alone(record: Any, signed: SignedContract) -> None:
    order = wire.encode_order(TrainOrder(contract=signed, round=1, weights=VALUES))
    order["weights"] = record
    with pytest.raises(VerificationFailed):
        wire.decode_order(order)


def test_an_empty_message_is_refused() -> None:
    for decode in (wire.decode_order, wire.decode_reply):
        with pytest.raises(VerificationFailed):
            decode(RecordDict())
