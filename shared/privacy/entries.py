"""The entries of a ledger: what is written, hashed and signed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from bract.shared import canonical, keys
from bract.shared.contract import Contract
from bract.shared.errors import VerificationFailed
from bract.shared.privacy import events
from bract.shared.terms import EvaluationTerms, Hex32, Mechanism, Name, Unit

SCHEMA_VERSION: Final = 1
NO_PREVIOUS = "0" * 64
FloatHex = Annotated[str, Field(pattern=r"^-?0x[01]\.[0-9a-f]+p[+-][0-9]+$")]


class _Body(BaseModel):
    """What every entry carries."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1]
    site: Name
    key: Hex32
    domain: Name
    sequence: Annotated[int, Field(ge=0)]
    previous: Hex32
    genesis: Hex32
    policy: Hex32
    attempt: Annotated[int, Field(ge=0)]


class Genesis(_Body):
    """The first entry: what stays fixed for the life of the ledger."""

    kind: Literal["genesis"]
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    simulation: bool
    unit: Unit
    adjacency: Literal["add-or-remove-one"]
    delta: FloatHex
    composition: dict[str, Any]


class Charge(_Body):
    """One round's cost, committed before any example is read; never refunded."""

    kind: Literal["charge"]
    contract: Hex32
    run: Name
    round: Annotated[int, Field(ge=1)]
    primary: Name
    weights: Hex32
    event: dict[str, Any]
    clip_norm: FloatHex
    clipping: Literal["flat-l2", "update-l2", "none"]
    normaliser: FloatHex
    sampler: Literal["poisson"]
    mechanism: Mechanism
    randomness: Literal["csprng", "seeded"]
    versions: dict[str, str]


class Evaluation(_Body):
    """What scoring a round's weights on the site's examples costs, beside the round's charge."""

    kind: Literal["evaluation"]
    contract: Hex32
    round: Annotated[int, Field(ge=1)]
    event: dict[str, Any]


class Release(_Body):
    """The hash of what left the site for a charge; `evaluation` is the noised (correct, total)."""

    kind: Literal["release"]
    contract: Hex32
    round: Annotated[int, Field(ge=1)]
    update: Hex32
    evaluation: Annotated[list[FloatHex], Field(min_length=2, max_length=2)] | None = None


class Joined(_Body):
    """What domains that share examples from now on were charged before, this one excepted.

    `contracts` names those of which the charges were.
    """

    kind: Literal["joined"]
    others: Annotated[list[Name], Field(min_length=1)]
    events: Annotated[list[dict[str, Any]], Field(min_length=1)]
    contracts: Annotated[list[Hex32], Field(min_length=1)]


class Recovered(_Body):
    """The operator's word that entries were lost: the domain's whole ceiling counts as spent.

    `lost_sequence` and `lost_hash` name the newest entry that is known to be gone, where a head
    file or a witness knew it. Nothing is charged to the domain afterwards.
    """

    kind: Literal["recovered"]
    event: dict[str, Any]
    lost_sequence: Annotated[int, Field(ge=0)] | None
    lost_hash: Hex32 | None


Body = Genesis | Charge | Evaluation | Release | Joined | Recovered
_ADAPTER: TypeAdapter[Body] = TypeAdapter(Annotated[Body, Field(discriminator="kind")])


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry as it rests: canonical body, signature, and the hash that both stand for."""

    body: Body
    text: bytes
    signature: bytes
    hash: str


@dataclass(frozen=True, slots=True)
class Head:
    """The last entry of a chain: an anchor against a cut tail."""

    sequence: int
    hash: str


def write(made: Body, key: keys.SigningKey) -> Entry:
    """Returns the signed entry of a body."""
    text = canonical.encode(made.model_dump())
    digest = _hash(made.previous, text)
    signature = key.sign(_signed(digest))
    _know(text, made)
    return Entry(body=made, text=text, signature=signature, hash=digest.hex())


def read(text: bytes, signature: bytes, *, key: str) -> Entry:
    """Returns an entry whose form is canonical and whose signature by `key` holds.

    Raises:
        VerificationFailed: for anything else.
    """
    found = body(text)
    if found.key != key:
        raise VerificationFailed("entry names another key than the pinned")
    digest = _hash(found.previous, text)
    keys.verify(key, signature, _signed(digest))
    return Entry(body=found, text=text, signature=signature, hash=digest.hex())


def event_of(entry: Charge | Evaluation) -> events.Event:
    """Returns what a charge or an evaluation costs."""
    return events.decode(entry.event)


def events_joined(entry: Joined) -> tuple[events.Event, ...]:
    """Returns what other domains were charged before, as an entry that joins them counts it."""
    return tuple(events.decode(event) for event in entry.events)


def body(text: bytes) -> Body:
    """Returns the body in canonical JSON; no signature is looked at.

    Raises:
        VerificationFailed: where it is none.
    """
    found = _KNOWN.get(text)
    if found is None:
        value = canonical.decode(text)
        try:
            found = _ADAPTER.validate_python(value)
        except ValidationError as error:
            raise VerificationFailed(f"not an entry of schema {SCHEMA_VERSION}") from error
        _know(text, found)
    return found


_KEPT = 1024
# What this process wrote or read, the newest: a site shows what it wrote, and its server in the
# same process reads it again.
_KNOWN: OrderedDict[bytes, Body] = OrderedDict()


def _know(text: bytes, found: Body) -> None:
    _KNOWN[text] = found
    while len(_KNOWN) > _KEPT:
        _KNOWN.popitem(last=False)


def body_hash(text: bytes) -> bytes:
    """Returns the hash by which a body is linked."""
    return canonical.tagged("body/1", text)


def link(previous: str, hashed: bytes) -> str:
    """Returns an entry's hash: H(previous ‖ H(body)).

    So that a link can be shown to a server without the body of another run.
    """
    return canonical.tagged("entry/1", bytes.fromhex(previous), hashed).hex()


def hash_of(text: bytes) -> str:
    """Returns the hash of the entry whose body this is."""
    return link(body(text).previous, body_hash(text))


def _hash(previous: str, text: bytes) -> bytes:
    return bytes.fromhex(link(previous, body_hash(text)))


def _signed(digest: bytes) -> bytes:
    return canonical.tagged("head/1", digest)


def clipping_for(agreed: Contract) -> Literal["flat-l2", "update-l2", "none"]:
    """Returns what a contract's mechanism clips: an example's gradient, or a whole update."""
    kinds: dict[Mechanism, Literal["flat-l2", "update-l2", "none"]] = {
        "dp-sgd": "flat-l2",
        "user-level": "update-l2",
        "none": "none",
    }
    return kinds[agreed.privacy.mechanism]


def event_for(agreed: Contract) -> dict[str, Any]:
    """Returns the event that one round of a contract costs, as a charge records it."""
    (event,) = _trained(agreed, 1)
    return events.encode(event)


def evaluation_for(asked: EvaluationTerms) -> dict[str, Any]:
    """Returns the event that one evaluation costs, as its entry records it."""
    (event,) = _evaluated(asked, 1)
    return events.encode(event)


def events_of_attempts(
    agreed: Contract, *, attempts: int, completed: int
) -> tuple[events.Event, ...]:
    """Returns what a site is charged at the most for attempts that completed so many rounds.

    All that a contract may ever cost is that of its `max_attempts`, with all rounds completed.
    """
    evaluated = events_of_evaluations(agreed.evaluation, attempts=attempts, completed=completed)
    return (*_trained(agreed, attempts), *evaluated)


def events_of_evaluations(
    asked: EvaluationTerms | None, *, attempts: int, completed: int
) -> tuple[events.Event, ...]:
    """Returns the evaluations alone of such attempts, before a contract is made of them."""
    if asked is None:
        return ()
    return _evaluated(asked, asked.most(attempts=attempts, completed=completed))


def events_of(agreed: Contract, *, rounds: int, evaluations: int) -> tuple[events.Event, ...]:
    """Returns what so many charges and evaluations of a contract cost."""
    evaluated = _evaluated(agreed.evaluation, evaluations) if agreed.evaluation else ()
    return (*_trained(agreed, rounds), *evaluated)


def _trained(agreed: Contract, rounds: int) -> tuple[events.Event, ...]:
    privacy = agreed.privacy
    if rounds < 1:
        return ()
    if privacy.mechanism == "none":
        return (events.Unbounded(),)
    if privacy.mechanism == "user-level":
        # One noised sum a round; whom the server asks it knows, so no sampling amplifies.
        return (events.PoissonGaussian(1.0, privacy.noise_multiplier, rounds),)
    return (
        events.PoissonGaussian(
            sampling_rate=privacy.sampling_rate,
            noise_multiplier=privacy.noise_multiplier,
            steps=rounds * agreed.training.local_steps,
        ),
    )


def _evaluated(asked: EvaluationTerms, evaluations: int) -> tuple[events.Event, ...]:
    # Every example is scored, so no sampling amplifies.
    if evaluations < 1:
        return ()
    return (events.PoissonGaussian(1.0, asked.noise_multiplier, evaluations),)
