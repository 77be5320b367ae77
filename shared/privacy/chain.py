"""One chain of entries as a fold: the gate that appends and the auditor that verifies share it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from bract.shared.errors import VerificationFailed
from bract.shared.privacy import events
from bract.shared.privacy.entries import (
    NO_PREVIOUS,
    Charge,
    Entry,
    Evaluation,
    Genesis,
    Head,
    Joined,
    Recovered,
    Release,
    event_of,
    events_joined,
)
from bract.shared.privacy.events import (
    Event,
    Kind,
    PoissonGaussian,
    Unbounded,
    count,
    merge,
    merged,
)

RoundKey = tuple[str, int]


@dataclass(slots=True, eq=False)
class Chain:
    """What the entries of one (site, domain) say so far.

    `charges` maps (contract, round) to its charges in order; `releases` maps (contract, round)
    to the last release; `evaluations` maps the number of a charge to the evaluation that was
    charged with it, `evaluated` counts them by contract, and `attempts` its charges; `led_to` is
    the greatest round that a contract was charged; `policies` are those in force, each with the
    entry from which on; `joined` are the entries that count charges of other domains; `events` are
    merged; `last` is the newest entry as it rests, body and signature. `forgotten` maps a contract
    to its last round of which no entries are held here.
    """

    site: str
    domain: str
    key: str
    genesis: Genesis | None = None
    genesis_hash: str = ""
    head: Head | None = None
    charges: defaultdict[RoundKey, list[Charge]] = field(default_factory=lambda: defaultdict(list))
    releases: dict[RoundKey, Release] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    attempts: Counter[str] = field(default_factory=Counter)
    led_to: dict[str, int] = field(default_factory=dict)
    evaluated: Counter[str] = field(default_factory=Counter)
    policies: list[tuple[int, str]] = field(default_factory=list)
    joined: list[Joined] = field(default_factory=list)
    seeded: bool = False
    recovered: Recovered | None = None
    last: tuple[bytes, bytes] | None = None
    forgotten: dict[str, int] = field(default_factory=dict)
    _events: Counter[Kind] = field(default_factory=Counter)

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything charged, merged."""
        lost = [events.decode(self.recovered.event)] if self.recovered else []
        return merge((*merged(self._events), *lost))

    @property
    def last_charge(self) -> Charge | None:
        """The newest charge, None before the first."""
        return max(
            (charge for charges in self.charges.values() for charge in charges),
            key=lambda charge: charge.sequence,
            default=None,
        )

    @property
    def length(self) -> int:
        """The number of entries."""
        return 0 if self.head is None else self.head.sequence + 1

    def events_of(self, contract: str) -> tuple[Event, ...]:
        """Returns what one contract was charged, merged."""
        return merge(event_of(cost) for cost in self.costs_of(contract))

    def events_until(self, sequence: int) -> tuple[Event, ...]:
        """Returns what was charged up to an entry, merged; by domains that it joined too."""
        charged = (event_of(cost) for cost in self.costs() if cost.sequence <= sequence)
        joined = (body for body in self.joined if body.sequence <= sequence)
        return merge((*charged, *(event for body in joined for event in events_joined(body))))

    def costs_of(self, contract: str) -> Iterator[Charge | Evaluation]:
        """Yields every entry by which one contract was charged, in no order."""
        return (cost for cost in self.costs() if cost.contract == contract)

    def costs(self) -> Iterator[Charge | Evaluation]:
        """Yields every entry that costs something, in no order."""
        for charges in self.charges.values():
            yield from charges
        yield from self.evaluations.values()

    def knows(self, rounds: Iterable[RoundKey] | None) -> bool:
        """Returns whether every entry of some rounds is held, None for all of the chain."""
        if rounds is None:
            return not self.forgotten
        return all(number > self.forgotten.get(contract, 0) for contract, number in rounds)

    def forget_(self) -> None:
        """Drops the entries of rounds; what was charged and what the next must follow stays.

        A charge that waits for its release is kept, since that is what comes next.
        """
        last = self.last_charge
        waiting = None if last is None else (last.contract, last.round)
        if last and waiting in self.releases and self.releases[waiting].attempt == last.attempt:
            waiting = None
        for contract, number in self.charges.keys() - {waiting}:
            self.forgotten[contract] = max(number, self.forgotten.get(contract, 0))
            del self.charges[contract, number]
        kept = {charge.sequence for charges in self.charges.values() for charge in charges}
        self.evaluations = {at: held for at, held in self.evaluations.items() if at in kept}
        self.releases = {at: held for at, held in self.releases.items() if at == waiting}

    def count_(self, charged: Iterable[Event]) -> None:
        """Counts charges that an entry stands for, or that the next would."""
        self._events.update(count(charged))

    def extend_(self, entry: Entry) -> None:
        """Adds the next entry.

        Raises:
            VerificationFailed: naming the entry and the rule it breaks.
        """
        body = entry.body
        self._check_link(entry)
        match body:
            case Genesis():
                self._check(body.sequence == 0, body.sequence, "a second genesis")
                self.genesis, self.genesis_hash = body, entry.hash
            case Charge():
                self._add_charge(body)
            case Evaluation():
                self._add_evaluation(body)
            case Release():
                self._add_release(body)
            case Joined():
                self._add_joined(body)
            case Recovered():
                self._add_recovered(body)
        if not self.policies or self.policies[-1][1] != body.policy:
            self.policies.append((body.sequence, body.policy))
        self.head = Head(sequence=body.sequence, hash=entry.hash)
        self.last = (entry.text, entry.signature)

    def _check_link(self, entry: Entry) -> None:
        body, number = entry.body, self.length
        self._check(body.sequence == number, number, f"sequence number is {body.sequence}")
        previous = NO_PREVIOUS if self.head is None else self.head.hash
        self._check(body.previous == previous, number, "does not follow the entry before it")
        self._check(body.site == self.site, number, f"belongs to the site {body.site!r}")
        self._check(body.domain == self.domain, number, f"belongs to the domain {body.domain!r}")
        if number == 0:
            self._check(isinstance(body, Genesis), 0, "the first entry is no genesis")
            self._check(body.genesis == NO_PREVIOUS, 0, "a genesis names no genesis")
        else:
            self._check(body.genesis == self.genesis_hash, number, "names another genesis")

    def _add_charge(self, charge: Charge) -> None:
        number = charge.sequence
        self._check(self.recovered is None, number, "a charge after entries were lost")
        before = self.charges[charge.contract, charge.round]
        self._check(charge.attempt == len(before) + 1, number, f"attempt {charge.attempt}")
        if before:
            self._check(
                charge.weights == before[0].weights, number, "the same round with other weights"
            )
        assert self.genesis is not None  # noqa: S101  checked by _check_link
        private = charge.mechanism == "dp-sgd" and charge.randomness == "csprng"
        self._check(
            private or self.genesis.simulation, number, "seeded or without noise on a real ledger"
        )
        client = charge.mechanism == "user-level"
        self._check(
            charge.mechanism == "none" or client == (self.genesis.unit == "client"),
            number,
            "the ledger protects another unit",
        )
        event = event_of(charge)
        self._check(not isinstance(event, events.Spent), number, "charges a ceiling")
        unbounded = isinstance(event, Unbounded)
        self._check(
            unbounded == (charge.mechanism == "none"), number, "event and mechanism disagree"
        )
        self.count_((event,))
        self.seeded |= charge.randomness == "seeded"
        self.attempts[charge.contract] += 1
        self.led_to[charge.contract] = max(charge.round, self.led_to.get(charge.contract, 0))
        before.append(charge)

    def _add_evaluation(self, evaluation: Evaluation) -> None:
        number = evaluation.sequence
        charges = self.charges.get((evaluation.contract, evaluation.round), [])
        self._check(bool(charges), number, "an evaluation without a charge")
        charge = charges[-1]
        self._check(
            evaluation.attempt == charge.attempt, number, "an evaluation of another attempt"
        )
        # So a charge has one at the most, and no release stands between them.
        self._check(
            charge.sequence == number - 1, number, "an evaluation that does not follow its charge"
        )
        self._check(
            evaluation.policy == charge.policy, number, "an evaluation under another policy"
        )
        event = event_of(evaluation)
        self._check(
            isinstance(event, PoissonGaussian), number, "an evaluation that is without noise"
        )
        self.count_((event,))
        self.evaluations[charge.sequence] = evaluation
        self.evaluated[evaluation.contract] += 1

    def _add_release(self, release: Release) -> None:
        charges = self.charges.get((release.contract, release.round), [])
        self._check(bool(charges), release.sequence, "a release without a charge")
        self._check(
            release.attempt == len(charges), release.sequence, "a release of another attempt"
        )
        self._check(
            charges[-1].primary == self.domain, release.sequence, "a release of another domain"
        )
        earlier = self.releases.get((release.contract, release.round))
        self._check(
            earlier is None or earlier.attempt < release.attempt,
            release.sequence,
            "a second release of one charge",
        )
        self._check(
            (charges[-1].sequence in self.evaluations) == (release.evaluation is not None),
            release.sequence,
            "charge and release disagree on an evaluation",
        )
        self.releases[release.contract, release.round] = release

    def _add_joined(self, joined: Joined) -> None:
        number, found = joined.sequence, events_joined(joined)
        self._check(self.recovered is None, number, "joined after entries were lost")
        self._check(self.domain not in joined.others, number, "joins itself")
        self._check(found == merge(found), number, "joined charges that are not merged")
        assert self.genesis is not None  # noqa: S101  checked by _check_link
        for event in found:
            self._check(not isinstance(event, events.Spent), number, "joins a ceiling")
            bounded = not isinstance(event, Unbounded)
            self._check(
                bounded or self.genesis.simulation, number, "without noise on a real ledger"
            )
        self.count_(found)
        self.joined.append(joined)

    def _add_recovered(self, recovered: Recovered) -> None:
        number = recovered.sequence
        # A second one could name a lower ceiling, which would then be the domain's ε.
        self._check(self.recovered is None, number, "recovered a second time")
        lost = isinstance(events.decode(recovered.event), events.Spent)
        self._check(lost, number, "recovered, but charges no ceiling")
        named = (recovered.lost_sequence is None) == (recovered.lost_hash is None)
        self._check(named, number, "half of what was lost is named")
        self.recovered = recovered

    def _check(self, holds: bool, number: int, fault: str) -> None:
        if not holds:
            raise VerificationFailed(
                f"ledger of {self.site!r}, domain {self.domain!r}, entry {number}: {fault}"
            )
