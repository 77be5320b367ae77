"""Federated averaging with public weights, on Flower's FedAvg."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from bract.server.witnesses import WitnessDesk
from bract.shared import arrays as named
from bract.shared import wire
from bract.shared.arrays import Array, Arrays
from bract.shared.contract import Contract, SignedContract, SiteTerms
from bract.shared.errors import Reason, RolledBack, VerificationFailed
from bract.shared.models import Shape
from bract.shared.privacy import entries
from bract.shared.privacy.receipts import Received
from bract.shared.privacy.witness import NOTHING, Extension
from bract.shared.updates import ProtectedUpdate

logger = logging.getLogger("bract.server")

INVALID_UPDATE = "invalid-update"
FAILED = "node-failed"
# How far beyond its expectation the norm of an honest update may be; see greatest_norm.
NORM_SLACK = 10.0


class PublicFedAvg(FedAvg):
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629) whose weights stand in the contract.

    A true number of examples would be an exact count of private data; the nominal size is public.
    What arrives are differences of weights; `aggregate_train` averages those.

    Args:
        signed: the contract that every message carries.
        shapes: names and shapes that an update must have exactly.
        desk: countersigns the heads of the sites' ledgers.
        names: the site of each node, where the grid knows it; else learned from receipts.
    """

    def __init__(
        self,
        signed: SignedContract,
        shapes: Mapping[str, Shape],
        desk: WitnessDesk,
        names: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=1)
        self._signed, self._shapes, self.desk = signed, shapes, desk
        self._registered, self._names = dict(names or {}), dict(names or {})
        self._retired: set[int] = set()
        self.replied: dict[str, wire.Receipt] = {}
        self.proofs: dict[str, tuple[bytes, Extension]] = {}
        self.refused: list[tuple[str, str]] = []
        self.update_bytes: int | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Returns one train order for each node that has not refused for good.

        Args:
            server_round: from 1.
            arrays: the weights as they travel (`wire.pack`); all orders share this record, so that
                it is hashed and held once.
            config: not used: what is asked stands in the contract.
            grid: knows which nodes are there.
        """
        return [
            Message(
                content=wire.encode_order(
                    wire.TrainOrder(
                        contract=self._signed,
                        round=server_round,
                        weights={},
                        witness=self.desk.witness(self._names.get(node)),
                    ),
                    packed=arrays,
                ),
                message_type=MessageType.TRAIN,
                dst_node_id=node,
                group_id=str(server_round),
            )
            for node in self.available(grid)
        ]

    def configure_close(self, grid: Grid) -> list[Message]:
        """Returns the last message of the run, for each node that has a witness to be given."""
        messages = []
        for node in sorted(set(grid.get_node_ids())):
            seen = self.desk.witness(self._names.get(node))
            if seen is not None:
                content = wire.encode_close(wire.CloseOrder(contract=self._signed, witness=seen))
                messages.append(Message(content, node, MessageType.QUERY, group_id="close"))
        return messages

    def available(self, grid: Grid) -> list[int]:
        """Returns the nodes that are there and have not refused for good."""
        return sorted(set(grid.get_node_ids()) - self._retired)

    @property
    def retired(self) -> int:
        """How many nodes have refused for good."""
        return len(self._retired)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the mean of the valid updates by public weight, None where there is none.

        Flower's own average holds two more copies of every update. `replied` and `refused` then
        say who answered what, `proofs` holds each receipt's signature and links, and `update_bytes`
        how large the largest accepted update was.
        """
        self.replied, self.refused, self.update_bytes = {}, [], None
        self.proofs = {}
        updates: dict[str, Arrays] = {}
        for message in list(replies):
            reply = self._sort(message, server_round)
            if reply is not None:
                updates[reply.receipt.site] = reply.update.arrays
        # In the contract's order: the sum of floats is the same whoever answers first.
        cohort = [site for site in self._signed.contract.cohort if site.name in updates]
        total = sum(site.nominal_size for site in cohort)
        average: dict[str, Array] = {}
        for site in cohort:
            share = site.nominal_size / total
            for name, value in updates.pop(site.name).items():  # each is dropped as it is added
                if name in average:
                    average[name] += value * share
                else:
                    average[name] = value * share
        return (wire.pack(average) if average else None), None

    def received(self, attempt: int, counted: bool) -> list[Received]:
        """Returns what an auditor may see of the updates that the last round took.

        Links are kept of a real run alone: of a simulation's the ledgers themselves are at hand.
        """
        agreed = self._signed.contract
        kept = agreed.witness is not None and not agreed.simulation
        return [
            Received(
                receipt=self.replied[site],
                signature=signature,
                ledger=ledger if kept else NOTHING,
                attempt=attempt,
                counted=counted,
            )
            for site, (signature, ledger) in sorted(self.proofs.items())
        ]

    def _sort(self, message: Message, server_round: int) -> wire.TrainReply | None:
        """Returns the reply whose update is accepted, None where there is none."""
        node = message.metadata.src_node_id
        if message.has_error():
            self._refuse(self._name(node), FAILED, "the node gave none")
            return None
        try:
            reply = wire.decode_reply(message.content)
            if isinstance(reply, wire.RefusalReply):
                # A node that is known speaks for its own site, whatever it calls itself.
                self._refuse(
                    self._registered.get(node, reply.site), reply.reason.value, "the site refused"
                )
                if Reason(reply.reason).final:
                    self._retired.add(node)
                return None
            self._accept(reply, server_round, node)
            self.update_bytes = max(self.update_bytes or 0, wire.update_bytes(message.content))
            return reply
        except RolledBack as error:
            self._refuse(self._name(node), Reason.LEDGER_ROLLED_BACK.value, str(error))
            # Asked again, it would charge its data for an update that is never used.
            self._retired.add(node)
        except VerificationFailed as error:
            self._refuse(self._name(node), INVALID_UPDATE, str(error))
        except Exception as error:
            # A reply is a stranger's: what it makes a reader raise must not end the run.
            self._refuse(self._name(node), INVALID_UPDATE, type(error).__name__)
        return None

    def _refuse(self, site: str, reason: str, detail: str) -> None:
        logger.warning(
            "no update of %s is used: %s",
            site,
            detail,
            extra={"event": "refused", "reason": reason, "site": site},
        )
        self.refused.append((site, reason))

    def _name(self, node: int) -> str:
        return self._names.get(node, f"node {node}")

    def _accept(self, reply: wire.TrainReply, server_round: int, node: int) -> None:
        contract, receipt = self._signed.contract, reply.receipt
        terms = contract.site(receipt.site)
        if terms is None:
            raise VerificationFailed("from a site that the contract does not list")
        reply.verify(terms.key)
        if (receipt.contract, receipt.round) != (contract.sha256, server_round):
            raise VerificationFailed("of another contract or round")
        private = contract.privacy.mechanism == "dp-sgd"
        if private != isinstance(reply.update, ProtectedUpdate):
            raise VerificationFailed("of another mechanism than the contract's")
        fault = named.fault(reply.update.arrays, self._shapes)
        if fault:
            raise VerificationFailed(fault)
        if private and _norm(reply.update.arrays) > greatest_norm(contract, terms, self._shapes):
            raise VerificationFailed("of a norm that the contract's steps cannot reach")
        if contract.evaluates(server_round) != (receipt.evaluation is not None):
            raise VerificationFailed("with or without an evaluation, unlike the contract's round")
        if receipt.site in self.replied:
            raise VerificationFailed("a second one from the same site")
        if self._registered.get(node, receipt.site) != receipt.site:
            raise VerificationFailed("of another site than the node's")
        self.desk.check(reply, terms.domain, cost=entries.event_for(contract))
        self.replied[receipt.site] = receipt
        self.proofs[receipt.site] = (reply.signature, reply.ledger)
        self._names[node] = receipt.site


def greatest_norm(contract: Contract, site: SiteTerms, shapes: Mapping[str, Shape]) -> float:
    """Returns a norm that no honest protected update comes near, from public terms alone.

    One step moves the weights by lr·(sum + noise)/(q·n). Each of b examples adds at most C to the
    sum, and the noise of d parameters has norm σ·C·√d; S steps with momentum m add up to at most
    lr·S/(1 − m) of one. b = q·n and √d are expectations, and a true n may differ from the nominal
    one: NORM_SLACK covers both by far. A finite but huge update would otherwise take the model
    beyond what sites train on (they refuse weights over 1e3) and so end the run for all.
    """
    training, privacy = contract.training, contract.privacy
    batch = contract.normaliser(site)
    noise = privacy.noise_multiplier * math.sqrt(sum(math.prod(s) for s in shapes.values()))
    step = privacy.clip_norm * (batch + 1 + noise) / batch
    reach = training.learning_rate * training.local_steps / (1 - training.momentum)
    return NORM_SLACK * reach * step


def _norm(arrays: Arrays) -> float:
    squares = (np.square(value, dtype=np.float64).sum() for value in arrays.values())
    return math.sqrt(sum(squares))
