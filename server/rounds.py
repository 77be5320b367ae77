"""The round loop: ask, average, step, score, checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from bract.server import checkpoint, fairness, received
from bract.server.checkpoint import RoundState
from bract.server.grid import SingleRunGrid
from bract.server.strategy import PublicFedAvg
from bract.shared import canonical, packing
from bract.shared.arrays import Array, Arrays
from bract.shared.contract import Contract
from bract.shared.data import Examples
from bract.shared.errors import BractError
from bract.shared.evaluation import Evaluator
from bract.shared.privacy import accounting, entries
from bract.shared.reports.runs import MetricsLine

logger = logging.getLogger("bract.server")

POLL_SECONDS = 0.1
FIRST_PAUSE_SECONDS = 1.0
UNCHARGED_TRIES = 3  # in a row, where no time passes between them


class CohortTooSmall(BractError):
    """Too few sites were connected, or could train, for as long as the federation allows."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds, and for how many.

    Args:
        minimum_cohort: with fewer updates a round is void, with fewer sites it is not begun.
        gather_seconds: how long to wait for the whole cohort before the first round.
        sites_seconds: how long to wait for that many sites; None waits for ever.
        pause_seconds: how long to wait at most before a void round is asked again; 0 where sites
            answer from this process, and waiting changes nothing.
        round_seconds: how long to wait for answers; None waits for all.
        close_seconds: how long to wait in the last exchange.
    """

    minimum_cohort: int = 1
    gather_seconds: float = 0.0
    sites_seconds: float | None = None
    pause_seconds: float = 0.0
    round_seconds: float | None = None
    close_seconds: float | None = None

    def before(self, void: int) -> float:
        """Returns how long to wait before a round of which so many attempts in a row were void."""
        if void < 2:  # the first fault may have passed already
            return 0.0
        return min(FIRST_PAUSE_SECONDS * 2.0 ** min(void - 2, 60), self.pause_seconds)

    def is_over(self, void: int) -> bool:
        """Returns whether sites that cannot train were asked often, or for long, enough."""
        if not self.pause_seconds:
            return void >= UNCHARGED_TRIES
        waited = sum(self.before(count) for count in range(void))
        return self.sites_seconds is not None and waited >= self.sites_seconds


@dataclass(frozen=True, slots=True, eq=False)
class RoundLoop:
    """What does not change from round to round.

    Args:
        contract: the run's terms.
        strategy: configures messages and averages what comes back.
        evaluator: scores weights.
        validation: public examples, scored after every round.
        out: the run folder: its checkpoint and metrics.jsonl.
        delta: at which ε is reported, round by round.
        patience: deadlines and the minimum cohort.
    """

    contract: Contract
    strategy: PublicFedAvg
    evaluator: Evaluator
    validation: Examples
    out: Path
    delta: float
    patience: Patience = Patience()

    def run(self, grid: Grid, state: RoundState) -> RoundState:
        """Returns the state after the last round that sites could serve, saved round by round.

        Raises:
            CohortTooSmall: where too few sites come, or their ledgers cannot be used, for longer
                than allowed; the run can go on later.
        """
        # Lines after the checkpoint are of a round that was killed and is run again.
        canonical.write_atomically(
            self.out / "metrics.jsonl", "".join(map(_line, state.metrics)).encode()
        )
        received.settle(self.out, attempts=state.attempts)
        self._gather(grid)
        void = 0  # attempts in a row
        while state.round < self.contract.rounds and state.attempts < self.contract.max_attempts:
            self._pause(void)
            following = self._round(grid, state)
            if following is None:
                logger.info("no site is left to ask", extra={"event": "stopped"})
                break
            if following is state:
                continue  # those that were there left before they were asked
            void = 0 if following.round > state.round else void + 1
            if following.attempts == state.attempts and self.patience.is_over(void):
                raise self._given_up(state.round + 1, void)
            state = following
        self._close(grid, state)
        return state

    def _pause(self, void: int) -> None:
        """Waits before a void round is asked again where a site refused for what may pass."""
        seconds = self.patience.before(void)
        if seconds and self.strategy.may_pass:
            logger.info("asking again in %g s", seconds, extra={"event": "waiting"})
            time.sleep(seconds)

    def _given_up(self, number: int, void: int) -> CohortTooSmall:
        sites = sorted({site for site, _ in self.strategy.refused})
        named = ", ".join(sites[:3]) + (" and others" if len(sites) > 3 else "")
        return CohortTooSmall(
            f"round {number} was void {void} times in a row, the last without any charge: "
            f"{len(sites)} of {len(self.contract.cohort)} sites refused with ledger-unavailable "
            f"({named}): mend what their logs name, then start the run again; it goes on from here"
        )

    def _close(self, grid: Grid, state: RoundState) -> None:
        """Delivers the last witnesses; a site that is away keeps an unwitnessed tail."""
        self.strategy.desk.remember(state.heads)
        messages = self.strategy.configure_close(grid)
        if messages:
            list(grid.send_and_receive(messages, timeout=self.patience.close_seconds))

    def _round(self, grid: Grid, state: RoundState) -> RoundState | None:
        """Returns the state after one attempt at the next round, None where none can be asked.

        The same state where nobody was asked.
        """
        started, number = time.monotonic(), state.round + 1
        if not self._wait_for_sites(grid):
            return None
        self.strategy.desk.remember(state.heads)  # what is saved, and nothing newer
        expected = min(state.charges + 1, self.contract.max_attempts)
        epsilon = self._epsilon(grid, expected, number)
        packed = packing.pack(state.weights)
        messages = self.strategy.configure_train(number, packed, ConfigRecord(), grid)
        if not messages:
            return state
        asked = len(messages)
        replies = grid.send_and_receive(messages, timeout=self.patience.round_seconds)
        average, _ = self.strategy.aggregate_train(number, replies)
        del replies
        if len(self.strategy.replied) < self.patience.minimum_cohort:
            average = None  # void: a mean over too few would say too much of each
        state = self._counted(state, asked, completed=average is not None)
        # Before the checkpoint: a head that is countersigned has what led to it on disk.
        received.append(self.out, self.strategy.received(state.attempts, average is not None))
        if average is not None:
            if state.charges > expected:
                epsilon = self._epsilon(grid, state.charges, number)
            told = {
                "weights_bytes": packing.bytes_of(packed),
                "epsilon_run": canonical.finite(epsilon()),
            }
            state = self._completed(state, packing.unpack(average), told)
        state = replace(state, seconds=state.seconds + time.monotonic() - started)
        checkpoint.save(state, self.out / "checkpoint")
        if average is not None:
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(_line(state.metrics[-1]))
        self._tell(state, completed=average is not None)
        return state

    def _counted(self, state: RoundState, asked: int, *, completed: bool) -> RoundState:
        """Returns the state with what the last attempt may have charged, and who refused.

        A receipt counts its site's charges for the round; its links show those of rounds that
        went on without it. An attempt that charged no site is none of the contract's: each gate
        bounds those by its own ledger. A site that was silent may have charged.
        """
        most = self.contract.max_attempts  # a gate refuses more charges, whatever a receipt says
        seen = max((receipt.attempt for receipt in self.strategy.replied.values()), default=0)
        heard = self.strategy.replied.keys() | {site for site, _ in self.strategy.refused}
        uncharged = self.strategy.uncharged and len(heard) == asked
        free = not completed and uncharged and seen <= state.tries
        tries = state.tries if free else max(state.tries + 1, seen)
        paid = self._paid(state)
        shown = max((each["charges"] for each in paid.values()), default=0)
        refused = tuple(
            {"site": site, "round": state.round + 1, "reason": reason}
            for site, reason in sorted(self.strategy.refused)
        )
        return replace(
            state,
            attempts=state.attempts + (not free),
            charges=min(max(state.charges + tries - state.tries, shown), most),
            paid=paid,
            tries=0 if completed else tries,
            refused=(*state.refused, *refused),
        )

    def _paid(self, state: RoundState) -> dict[str, dict[str, int]]:
        """Returns how many charges each site's links have shown, those of a round ago but once."""
        paid = {site: dict(each) for site, each in state.paid.items()}
        for site in self.strategy.replied:
            before = paid.get(site, {"sequence": -1, "charges": 0})
            new = [n for n in self.strategy.charged.get(site, ()) if n > before["sequence"]]
            if new:
                charges = before["charges"] + len(new)
                paid[site] = {"sequence": max(new), "charges": charges}
        return paid

    def _gather(self, grid: Grid) -> None:
        """Waits for the whole cohort, and goes on with fewer when the time is over."""
        deadline = time.monotonic() + self.patience.gather_seconds
        while (found := len(self.strategy.available(grid))) < len(self.contract.cohort):
            if time.monotonic() >= deadline:
                logger.warning("%d of %d sites are here", found, len(self.contract.cohort))
                return
            time.sleep(POLL_SECONDS)

    def _wait_for_sites(self, grid: Grid) -> bool:
        """Returns whether enough sites are there; False where too many refused for good.

        Raises:
            CohortTooSmall: where they stay away for longer than allowed.
        """
        need, began = self.patience.minimum_cohort, time.monotonic()
        limit = self.patience.sites_seconds
        while len(found := self.strategy.available(grid)) < need:
            if len(self.contract.cohort) - len(self.strategy.retired(grid)) < need:
                return False
            if limit is not None and time.monotonic() - began > limit:
                raise CohortTooSmall(
                    f"{len(found)} of the {need} sites that a round needs were connected within "
                    f"{limit:g} s: start the sites, then the server again; it goes on from here"
                )
            time.sleep(POLL_SECONDS)
        return True

    def _completed(self, state: RoundState, average: Arrays, told: Mapping[str, Any]) -> RoundState:
        weights, velocity = self._step(state, average)
        score = self.evaluator.score(weights, self.validation)
        heads = dict(state.heads)
        for name, receipt in self.strategy.replied.items():
            heads[name] = {
                "domain": receipt.head_domain,
                "sequence": receipt.head_sequence,
                "hash": receipt.head_hash,
            }
        line = {
            "round": state.round + 1,
            "validation_accuracy": score.accuracy,
            "validation_loss": score.loss,
            "validation_perplexity": score.perplexity,
            **fairness.of_round(self.strategy.replied, self.contract).model_dump(),
            **told,
            "update_bytes": self.strategy.update_bytes,
            "replied": len(self.strategy.replied),
            "refused": len(self.strategy.refused),
        }
        return replace(
            state,
            round=state.round + 1,
            weights=weights,
            velocity=velocity,
            heads=heads,
            metrics=(*state.metrics, line),
        )

    def _step(
        self, state: RoundState, average: Arrays
    ) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
        """Returns weights and velocity after v ← m·v + average, w ← w + lr·v.

        Hsu, Qi & Brown 2019 (arXiv 1909.06335); post-processing, so it costs no privacy.
        """
        terms = self.contract.training
        velocity = {
            name: np.float32(terms.server_momentum) * state.velocity[name] + value
            for name, value in average.items()
        }
        rate = np.float32(terms.server_rate(state.round + 1, self.contract.rounds))
        weights = {name: state.weights[name] + rate * value for name, value in velocity.items()}
        return weights, velocity

    def _epsilon(self, grid: Grid, charges: int, completed: int) -> Callable[[], float]:
        """Returns what gives the most that a site has spent in this run, as receipts show.

        It takes tens of milliseconds, which a grid may have to spare elsewhere.
        """
        events = entries.events_of_attempts(self.contract, attempts=charges, completed=completed)
        spent = partial(accounting.epsilon, events, self.delta)
        return grid.aside(spent) if isinstance(grid, SingleRunGrid) else spent

    def _tell(self, state: RoundState, *, completed: bool) -> None:
        line: dict[str, Any] = dict(state.metrics[-1]) if completed else {"round": state.round + 1}
        logger.info(
            "round %d %s",
            line["round"],
            "completed" if completed else "void",
            extra={"event": "round", "completed": completed, "line": line},
        )


def initial_state(contract: Contract, weights: Arrays) -> RoundState:
    """Returns the state before round 1."""
    return RoundState(
        contract=contract.sha256,
        weights=dict(weights),
        velocity={name: np.zeros_like(value) for name, value in weights.items()},
    )


def _line(values: Mapping[str, Any]) -> str:
    return MetricsLine.model_validate(values).model_dump_json() + "\n"
