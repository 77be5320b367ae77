"""The messages between server and site: the only place that knows their keys.

train    server → site   weights: arrays   order: contract, round
update   site → server   update (or unprotected-update): arrays   receipt: signed facts
refusal  site → server   refusal: reason, site, round
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from bract.shared import arrays as named
from bract.shared import canonical, keys
from bract.shared.arrays import Arrays
from bract.shared.contract import SignedContract, from_bytes
from bract.shared.errors import Reason, UsageError, VerificationFailed
from bract.shared.updates import ProtectedUpdate, UnprotectedUpdate, Update

_WEIGHTS, _ORDER = "weights", "order"
_UPDATE, _UNPROTECTED, _RECEIPT, _REFUSAL = "update", "unprotected-update", "receipt", "refusal"
_STYPE = "numpy.ndarray.raw"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class TrainOrder:
    """Train one round of a contract from these weights."""

    contract: SignedContract
    round: int
    weights: Arrays


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a site says of an update, signed by its ledger key: public facts alone."""

    contract: str
    site: str
    round: int
    attempt: int
    update: str
    head_domain: str
    head_sequence: int
    head_hash: str

    def digest(self) -> bytes:
        """Returns what the site signs."""
        return canonical.tagged("receipt/1", canonical.encode(asdict(self)))


@dataclass(frozen=True, slots=True, eq=False)
class TrainReply:
    """An update with its receipt and the site's signature of it."""

    update: Update
    receipt: Receipt
    signature: bytes

    def verify(self, key: str) -> None:
        """Returns where the site's key signed the receipt and the receipt names the update.

        Raises:
            VerificationFailed: otherwise.
        """
        keys.verify(key, self.signature, self.receipt.digest())
        if named.digest(self.update.arrays) != self.receipt.update:
            raise VerificationFailed("the receipt is of another update")


@dataclass(frozen=True, slots=True)
class RefusalReply:
    """A reason of the closed list; nothing of the site's data."""

    site: str
    round: int
    reason: Reason


def encode_order(order: TrainOrder) -> RecordDict:
    """Returns the content of a train message."""
    terms = ConfigRecord({"contract": order.contract.to_bytes(), "round": order.round})
    return RecordDict({_WEIGHTS: _pack(order.weights), _ORDER: terms})


def decode_order(content: RecordDict) -> TrainOrder:
    """Returns the train order in a message.

    Raises:
        VerificationFailed: for a message of any other form.
    """
    records = _exactly(content, {_WEIGHTS, _ORDER})
    terms = _config(records[_ORDER], {"contract", "round"})
    try:
        signed = from_bytes(_typed(terms, "contract", bytes))
    except UsageError as error:
        raise VerificationFailed(str(error)) from error
    return TrainOrder(
        contract=signed,
        round=_typed(terms, "round", int),
        weights=_unpack(records[_WEIGHTS]),
    )


def encode_reply(reply: TrainReply) -> RecordDict:
    """Returns the content of an update; a protected and an unprotected one differ in their key."""
    name = _UPDATE if isinstance(reply.update, ProtectedUpdate) else _UNPROTECTED
    receipt = ConfigRecord({**asdict(reply.receipt), "signature": reply.signature})
    return RecordDict({name: _pack(reply.update.arrays), _RECEIPT: receipt})


def encode_refusal(refusal: RefusalReply) -> RecordDict:
    """Returns the content of a refusal."""
    record = ConfigRecord(
        {"site": refusal.site, "round": refusal.round, "reason": refusal.reason.value}
    )
    return RecordDict({_REFUSAL: record})


def decode_reply(content: RecordDict) -> TrainReply | RefusalReply:
    """Returns what a site answered; the receipt is not yet verified.

    Raises:
        VerificationFailed: for a message of any other form, an extra record included.
    """
    if set(content) == {_REFUSAL}:
        record = _config(content[_REFUSAL], {"site", "round", "reason"})
        try:
            reason = Reason(_typed(record, "reason", str))
        except ValueError as error:
            raise VerificationFailed("a refusal with an unknown reason") from error
        return RefusalReply(
            site=_typed(record, "site", str), round=_typed(record, "round", int), reason=reason
        )
    name = _UPDATE if _UPDATE in content else _UNPROTECTED
    records = _exactly(content, {name, _RECEIPT})
    values = _unpack(records[name])
    facts = _config(records[_RECEIPT], {*Receipt.__dataclass_fields__, "signature"})
    receipt = Receipt(
        contract=_typed(facts, "contract", str),
        site=_typed(facts, "site", str),
        round=_typed(facts, "round", int),
        attempt=_typed(facts, "attempt", int),
        update=_typed(facts, "update", str),
        head_domain=_typed(facts, "head_domain", str),
        head_sequence=_typed(facts, "head_sequence", int),
        head_hash=_typed(facts, "head_hash", str),
    )
    made = ProtectedUpdate if name == _UPDATE else UnprotectedUpdate
    return TrainReply(
        update=made(values), receipt=receipt, signature=_typed(facts, "signature", bytes)
    )


def _pack(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord(
        {
            name: FlowerArray(
                dtype=str(value.dtype), shape=value.shape, stype=_STYPE, data=value.tobytes()
            )
            for name, value in arrays.items()
        }
    )


def _unpack(record: Any) -> dict[str, named.Array]:
    if not isinstance(record, ArrayRecord):
        raise VerificationFailed("a message without arrays")
    return {name: _unpack_one(name, value) for name, value in record.items()}


def _unpack_one(name: str, value: FlowerArray) -> named.Array:
    # Never np.load: raw float32 bytes cannot hold an object, so nothing is unpickled.
    shape = tuple(value.shape)
    # math.prod has no width that a hostile shape could overflow.
    expected = 4 * math.prod(shape) if all(n >= 0 for n in shape) else -1
    if value.stype != _STYPE or value.dtype != "float32" or len(value.data) != expected:
        raise VerificationFailed(f"array {name!r} is not raw float32 of its shape")
    try:
        return np.frombuffer(value.data, dtype=np.float32).reshape(shape).copy()
    except (ValueError, OverflowError) as error:  # no elements, yet an axis beyond numpy's
        raise VerificationFailed(f"array {name!r} has a shape that cannot be held") from error


def _exactly(content: RecordDict, names: set[str]) -> Mapping[str, Any]:
    if set(content) != names:
        raise VerificationFailed(f"a message with other records than {sorted(names)}")
    return dict(content)


def _config(record: Any, fields: set[str]) -> Mapping[str, Any]:
    if not isinstance(record, ConfigRecord) or set(record) != fields:
        raise VerificationFailed(f"a message with other facts than {sorted(fields)}")
    return dict(record)


def _typed(record: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    value = record.get(name)
    if type(value) is not kind:
        raise VerificationFailed(f"{name} is missing or of another type")
    return value
