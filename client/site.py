"""A site in one process: its gate, its randomness, and a model kept warm between rounds."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass, field

from bract.client.fingerprint import Fingerprints
from bract.client.gate import Gate
from bract.client.permits import Permit
from bract.client.training.execution import Execution
from bract.client.training.randomness import Randomness
from bract.client.training.together import Job
from bract.client.training.trainer import Trainer
from bract.shared.arrays import Arrays
from bract.shared.contract import Contract
from bract.shared.data import Examples
from bract.shared.errors import BractError, Reason, Refusal
from bract.shared.messages import RefusalReply, TrainOrder, TrainReply
from bract.shared.terms import SiteTerms
from bract.shared.updates import ProtectedScore, Update

logger = logging.getLogger("bract.client")


@dataclass(slots=True)
class Trainers:
    """Warm models by contract; one process needs one, however many sites it serves."""

    execution: Execution
    _last: tuple[str, Trainer] | None = None

    def of(self, contract: Contract) -> Trainer:
        """Returns the trainer of a contract, made where another one was warm."""
        name = contract.sha256
        if self._last is None or self._last[0] != name:
            self._last = (name, Trainer(contract, self.execution))
        return self._last[1]


@dataclass(slots=True, eq=False, kw_only=True)
class Learner:
    """What a site trains with once its gate has said yes: it holds no key and opens no ledger."""

    name: str
    randomness: Randomness
    trainers: Trainers = field(repr=False)
    fingerprints: Fingerprints | None = None

    def job(self, admitted: Permit, examples: Examples) -> Job:
        """Returns what training under a permit needs."""
        domain = admitted.terms.domain
        if self.fingerprints and self.fingerprints.changed(domain, examples):
            logger.warning(
                "the data of domain %r changed since it was last opened: its ledger goes on, and "
                "nothing is refunded",
                domain,
                extra={"site": self.name},
            )
        return Job(admitted.terms, examples, self.randomness.stream(admitted.round))

    def score(self, admitted: Permit, job: Job, weights: Arrays) -> ProtectedScore | None:
        """Returns the noised score that a permit asks for, if it does.

        After training, so that what is trained is the same without it.
        """
        if not admitted.evaluates:
            return None
        trainer = self.trainers.of(admitted.contract)
        return trainer.score(examples=job.examples, weights=weights, stream=job.stream)

    def refusal(self, error: Exception, round_number: int) -> RefusalReply:
        """Returns what may leave of a failure, and notes it in the site's own log."""
        reason = Reason.SITE_FAILED
        if isinstance(error, Refusal):
            reason, told = error.reason, {"event": "refused", "reason": error.reason.value}
            logger.warning("%s", error, extra={"site": self.name, **told})
        elif isinstance(error, BractError):
            logger.error("site failed: %s", error, extra={"site": self.name})
        else:
            # Only the type: the text of a library's exception may hold a value of the data.
            logger.error("site failed: %s", type(error).__name__, extra={"site": self.name})
            logger.debug("at %s", "".join(traceback.format_tb(error.__traceback__)))
        return RefusalReply(site=self.name, round=round_number, reason=reason)


@dataclass(slots=True, eq=False, kw_only=True)
class Site(Learner):
    """What answers a train order.

    Attributes:
        failed: domains of which a charge was followed by a failure. This process charges them no
            more: what the data or the model make fail would fail at every round.
    """

    gate: Gate
    failed: set[str] = field(default_factory=set)

    def train(self, order: TrainOrder) -> TrainReply | RefusalReply:
        """Returns an update, or a refusal whose only content is a reason of the closed list.

        Any failure at all becomes such a refusal: an exception's text could quote private data.
        """
        try:
            return self._train(order)
        except Exception as error:
            return self.refusal(error, order.round)

    def check(self, order: TrainOrder) -> SiteTerms:
        """Returns this site's terms where order and weights will do; nothing is charged yet.

        Raises:
            Refusal: otherwise.
            ModelRejected: where the model cannot be trained privately.
        """
        # Trust before construction: a model's factory is run only for a contract the gate takes.
        terms = self.gate.check(order)
        self.check_failed(terms)
        self.trainers.of(order.contract.contract).check(order.weights)
        return terms

    def check_failed(self, terms: SiteTerms) -> None:
        """Returns where no charge of this process to the domain was followed by a failure.

        Raises:
            Refusal: otherwise.
        """
        if terms.domain in self.failed:
            raise Refusal(
                Reason.SITE_FAILED,
                f"a round on domain {terms.domain!r} was charged and failed: mend what the line "
                "before or --check names, and start again",
            )

    def _train(self, order: TrainOrder) -> TrainReply:
        terms = self.check(order)
        admitted = self.gate.admit(order)
        if not isinstance(admitted, Permit):
            return admitted
        try:
            update, score = self._trained(admitted, admitted.open_examples(), order.weights)
            return self.gate.release(admitted, update, score)
        except Exception:
            self.failed.add(terms.domain)
            raise

    def _trained(
        self, admitted: Permit, examples: Examples, weights: Arrays
    ) -> tuple[Update, ProtectedScore | None]:
        job = self.job(admitted, examples)
        trainer = self.trainers.of(admitted.contract)
        update = trainer.train(
            terms=job.terms, examples=examples, weights=weights, stream=job.stream
        )
        return update, self.score(admitted, job, weights)
