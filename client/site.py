"""A site in one process: its gate, its randomness, and a model kept warm between rounds."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass, field

import numpy as np

from bract.client.fingerprint import Fingerprints
from bract.client.gate import Gate, Permit
from bract.client.training.randomness import Randomness
from bract.client.training.trainer import Execution, Trainer
from bract.shared import arrays
from bract.shared.contract import Contract
from bract.shared.errors import BractError, Reason, Refusal
from bract.shared.wire import RefusalReply, TrainOrder, TrainReply

logger = logging.getLogger("bract.client")

# Above this, weights that a server chose to cancel could make the rounding of one example's
# gradient, which varies with the size of the batch, as large as the clip norm. Public, so that
# refusing tells nothing; trained weights stay far below it.
GREATEST_WEIGHT = 1e3


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


@dataclass(slots=True, eq=False)
class Site:
    """What answers a train order."""

    name: str
    gate: Gate
    randomness: Randomness
    trainers: Trainers = field(repr=False)
    fingerprints: Fingerprints | None = None

    def train(self, order: TrainOrder) -> TrainReply | RefusalReply:
        """Returns an update, or a refusal whose only content is a reason of the closed list.

        Any failure at all becomes such a refusal: an exception's text could quote private data.
        """
        try:
            return self._train(order)
        except Refusal as refusal:
            reason = refusal.reason
            logger.warning(
                "%s",
                refusal,
                extra={"event": "refused", "site": self.name, "reason": reason.value},
            )
        except BractError as error:
            reason = Reason.SITE_FAILED
            logger.error("site failed: %s", error, extra={"site": self.name})
        except Exception as error:
            # Only the type: the text of a library's exception may hold a value of the data.
            reason = Reason.SITE_FAILED
            logger.error("site failed: %s", type(error).__name__, extra={"site": self.name})
            logger.debug("at %s", "".join(traceback.format_tb(error.__traceback__)))
        return RefusalReply(site=self.name, round=order.round, reason=reason)

    def _train(self, order: TrainOrder) -> TrainReply:
        trainer = self._trainer(order)
        fault = arrays.fault(order.weights, trainer.shapes)
        if fault or any(
            np.abs(value).max(initial=0) > GREATEST_WEIGHT for value in order.weights.values()
        ):
            raise Refusal(Reason.WEIGHTS_INVALID, fault or f"a weight is over {GREATEST_WEIGHT:g}")
        admitted = self.gate.admit(order)
        if not isinstance(admitted, Permit):
            return admitted
        examples = admitted.open_examples()
        domain = admitted.terms.domain
        if self.fingerprints and self.fingerprints.changed(domain, examples):
            logger.warning(
                "the data of domain %r changed since it was last opened: its ledger goes on, and "
                "nothing is refunded",
                domain,
                extra={"site": self.name},
            )
        stream = self.randomness.stream(admitted.round)
        update = trainer.train(
            terms=admitted.terms, examples=examples, weights=order.weights, stream=stream
        )
        score = None
        if admitted.evaluates:  # after training, so that what is trained is the same without it
            score = trainer.score(examples=examples, weights=order.weights, stream=stream)
        return self.gate.release(admitted, update, score)

    def _trainer(self, order: TrainOrder) -> Trainer:
        # Trust before construction: a model's factory is run only for a contract the gate takes.
        self.gate.check(order)
        return self.trainers.of(order.contract.contract)
