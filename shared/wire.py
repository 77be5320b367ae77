"""The messages between server and site: the only place that knows their keys.

train    server → site   weights: arrays   order: contract, round, witness
update   site → server   update (or clipped-, unprotected-update): arrays
                         receipt: signed facts
                         ledger: the entries since the last witness
refusal  site → server   refusal: reason, site, round
close    server → site   close: contract, witness
closed   site → server   closed: site

Where a simulation adds updates up in the process that trained them, many replies are one:
summed   site → server   summed: the receipts and ledgers of the sites that are in it
                         sum: arrays
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from bract.shared import canonical, contract
from bract.shared.arrays import Arrays
from bract.shared.contract import SignedContract
from bract.shared.errors import Reason, UsageError, VerificationFailed
from bract.shared.messages import (
    CloseOrder,
    RefusalReply,
    SignedReceipt,
    SummedReply,
    TrainOrder,
    TrainReply,
)
from bract.shared.packing import bytes_of, pack, unpack, unpack_sum
from bract.shared.privacy.receipts import Receipt
from bract.shared.privacy.witness import Extension, Link, Witness, from_bytes
from bract.shared.updates import ClippedUpdate, ProtectedUpdate, UnprotectedUpdate, Update

_WEIGHTS, _ORDER = "weights", "order"
_UPDATE, _RECEIPT, _REFUSAL = "update", "receipt", "refusal"
_KINDS: dict[str, type[Update]] = {
    _UPDATE: ProtectedUpdate,
    "clipped-update": ClippedUpdate,
    "unprotected-update": UnprotectedUpdate,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_LEDGER, _CLOSE, _CLOSED = "ledger", "close", "closed"
_SUMMED, _SUM = "summed", "sum"
_GREATEST = 2.0**53  # no count is larger; sums of such stay finite, whoever sends them
_T = TypeVar("_T")


def update_bytes(content: RecordDict) -> int:
    """Returns the bytes of the update in a reply, as they travelled."""
    return sum(
        bytes_of(content.array_records[name]) for name in _KINDS if name in content.array_records
    )


def encode_order(order: TrainOrder, *, packed: ArrayRecord | None = None) -> RecordDict:
    """Returns the content of a train message.

    Args:
        order: what to do.
        packed: the weights as they travel, in the place of the order's.
    """
    terms = ConfigRecord(
        {
            "contract": order.contract.to_bytes(),
            "round": order.round,
            "witness": _optional(order.witness),
        }
    )
    return RecordDict({_WEIGHTS: pack(order.weights) if packed is None else packed, _ORDER: terms})


def decode_order(content: RecordDict) -> TrainOrder:
    """Returns the train order in a message.

    Raises:
        VerificationFailed: for a message of any other form.
    """
    return _order(content, {})


def decode_orders(contents: Iterable[RecordDict]) -> list[TrainOrder | VerificationFailed]:
    """Returns the train order in each message, or why it is none.

    Orders that share a record of weights share its arrays too.
    """
    unpacked: dict[int, Arrays] = {}
    orders: list[TrainOrder | VerificationFailed] = []
    for content in contents:
        try:
            orders.append(_order(content, unpacked))
        except VerificationFailed as error:
            orders.append(error)
    return orders


def _order(content: RecordDict, unpacked: dict[int, Arrays]) -> TrainOrder:
    records = _exactly(content, {_WEIGHTS, _ORDER})
    terms = _config(records[_ORDER], {"contract", "round", "witness"})
    record = records[_WEIGHTS]
    if id(record) not in unpacked:  # the messages that are being read keep their records alive
        unpacked[id(record)] = unpack(record)
    return TrainOrder(
        contract=_contract(terms),
        round=_typed(terms, "round", int),
        weights=unpacked[id(record)],
        witness=_witness(terms),
    )


def encode_close(order: CloseOrder) -> RecordDict:
    """Returns the content of a closing message."""
    terms = ConfigRecord(
        {"contract": order.contract.to_bytes(), "witness": order.witness.to_bytes()}
    )
    return RecordDict({_CLOSE: terms})


def decode_close(content: RecordDict) -> CloseOrder:
    """Returns the closing order in a message.

    Raises:
        VerificationFailed: for a message of any other form.
    """
    terms = _config(_exactly(content, {_CLOSE})[_CLOSE], {"contract", "witness"})
    witness = _witness(terms)
    if witness is None:
        raise VerificationFailed("a closing message without a witness")
    return CloseOrder(contract=_contract(terms), witness=witness)


def encode_closed(site: str) -> RecordDict:
    """Returns the content of the answer to a closing message."""
    return RecordDict({_CLOSED: ConfigRecord({"site": site})})


def encode_reply(reply: TrainReply) -> RecordDict:
    """Returns the content of an update; a protected and an unprotected one differ in their key."""
    name = _NAMES[type(reply.update)]
    return RecordDict({name: pack(reply.update.arrays), **_signed(reply)})


def encode_summed(reply: SummedReply) -> RecordDict:
    """Returns the content of the one message that stands for the replies of a sum's sites."""
    signed = list(reply.receipts.values())
    summed = ConfigRecord(
        {
            "place": reply.place,
            "nodes": list(reply.receipts),
            "receipts": [one.receipt.to_bytes() for one in signed],
            "signatures": [one.signature for one in signed],
            "since": [_optional(one.ledger.since) for one in signed],
            "lengths": [len(one.ledger.links) for one in signed],
            "hashes": [link.body_hash for one in signed for link in one.ledger.links],
            "bodies": [link.body for one in signed for link in one.ledger.links],
        }
    )
    return RecordDict({_SUMMED: summed, _SUM: pack(reply.total)})


def _signed(reply: SignedReceipt) -> dict[str, ConfigRecord]:
    facts = {**reply.receipt.facts(), "evaluation": list(reply.receipt.evaluation or ())}
    receipt = ConfigRecord({**facts, "signature": reply.signature})
    ledger = ConfigRecord(
        {
            "since": _optional(reply.ledger.since),
            "hashes": [link.body_hash for link in reply.ledger.links],
            "bodies": [link.body for link in reply.ledger.links],
        }
    )
    return {_RECEIPT: receipt, _LEDGER: ledger}


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
    name = next((name for name in _KINDS if name in content), _UPDATE)
    records = _exactly(content, {name, _RECEIPT, _LEDGER})
    values, signed = unpack(records[name]), _signed_receipt(records)
    update = _KINDS[name](values)
    return TrainReply(signed.receipt, signed.signature, signed.ledger, update=update)


def decode_summed(content: RecordDict) -> SummedReply | None:
    """Returns the replies that are in a sum, None for a message of another kind.

    Only for a grid that adds up in its own processes: a stranger's sum could not be checked.

    Raises:
        VerificationFailed: for a message that is not quite of that form.
    """
    if _SUMMED not in content:
        return None
    records = _exactly(content, {_SUMMED, _SUM})
    columns = ["nodes", "receipts", "signatures", "since", "lengths", "hashes", "bodies"]
    summed = _config(records[_SUMMED], {"place", *columns})
    nodes, receipts, signatures, since, lengths, hashes, bodies = (
        _typed(summed, name, list) for name in columns
    )
    links = iter(_links(hashes, bodies))
    each = zip(nodes, receipts, signatures, since, lengths, strict=True)
    return SummedReply(
        place=_typed(summed, "place", int),
        receipts={
            node: SignedReceipt(
                receipt=_receipt(text),
                signature=signature,
                ledger=Extension(from_bytes(seen) if seen else None, tuple(islice(links, count))),
            )
            for node, text, signature, seen, count in each
        },
        total=unpack_sum(records[_SUM]),
    )


def _receipt(text: bytes) -> Receipt:
    facts = canonical.decode(text)
    return Receipt(**{**facts, "evaluation": _pair(facts["evaluation"] or [])})


def _signed_receipt(records: Mapping[str, Any]) -> SignedReceipt:
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
        evaluation=_evaluation(facts),
    )
    return SignedReceipt(
        receipt=receipt,
        signature=_typed(facts, "signature", bytes),
        ledger=_extension(_config(records[_LEDGER], {"since", "hashes", "bodies"})),
    )


def _evaluation(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """Returns the noised pair, None for an empty list: a record cannot hold 'none'."""
    return _pair(_typed(record, "evaluation", list))


def _pair(values: list[Any]) -> tuple[float, float] | None:
    if not values:
        return None
    if len(values) != 2 or not all(type(v) is float and abs(v) <= _GREATEST for v in values):
        raise VerificationFailed("an evaluation that is not two counts")
    return values[0], values[1]


def _optional(witness: Witness | None) -> bytes:
    return witness.to_bytes() if witness else b""


def _witness(record: Mapping[str, Any], name: str = "witness") -> Witness | None:
    text = _typed(record, name, bytes)
    return from_bytes(text) if text else None


def _contract(record: Mapping[str, Any]) -> SignedContract:
    try:
        return contract.from_bytes(_typed(record, "contract", bytes))
    except UsageError as error:
        raise VerificationFailed(str(error)) from error


def _extension(record: Mapping[str, Any]) -> Extension:
    hashes, bodies = _typed(record, "hashes", list), _typed(record, "bodies", list)
    return Extension(since=_witness(record, "since"), links=_links(hashes, bodies))


def _links(hashes: list[Any], bodies: list[Any]) -> tuple[Link, ...]:
    if len(hashes) != len(bodies) or not all(
        type(one) is bytes and len(one) == 32 and type(other) is bytes
        for one, other in zip(hashes, bodies, strict=True)
    ):
        raise VerificationFailed("the entries since a witness are not hashes and bodies")
    return tuple(Link(*pair) for pair in zip(hashes, bodies, strict=True))


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
