"""A site's process: connect, answer orders by the installed app, connect again, stop cleanly."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from bract.client import installed, settings
from bract.client.app import app
from bract.client.back_off import BackOff
from bract.client.faults import UNREADABLE, Disconnected, NotTaken
from bract.client.flower import Address, Connection
from bract.client.installed import SiteState
from bract.client.settings import SiteSettings
from bract.shared import canonical, keyfiles, malloc, node_keys

logger = logging.getLogger("bract.client")

# How long an end may be held up, above all by a server that is not told so.
LEAVING_SECONDS = 5.0


class Stopped(BaseException):
    """SIGTERM or SIGINT; no handler of ordinary failures may swallow it."""


def serve(path: Path) -> None:
    """Serves a site until it is told to stop.

    Raises:
        BractError: where the server does not let this site in, its certificate does not hold, or
            another process of the site has connected since.
    """
    chosen = settings.read(path)
    site = installed.opened(str(path))
    context = Context(
        run_id=0,
        node_id=0,
        node_config={"site-factory": installed.FACTORY, "site": str(path)},
        state=RecordDict(),
        run_config={},
    )
    key = node_keys.load(Path(chosen.keys.node))
    keyfiles.warn_if_open(Path(chosen.keys.node))
    address = Address(chosen.server, Path(chosen.keys.root_certificate))
    journal = Journal(SiteState(Path(chosen.state)), site.name)
    greatest = chosen.greatest_order_mib * 2**20
    try:
        with (
            _stoppable(chosen) as patience,
            Connection(address, key, greatest_order=greatest) as connection,
        ):
            _serve(connection, Answers(app, context, patience), journal)
    except Stopped:
        logger.info("stopped", extra={"event": "stopped", "site": site.name})
    finally:
        journal.write("stopped")


class Patience:
    """Whether a stop was asked for, and whether a round may still be finished first."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._stopping = seconds, False
        self.training, self.asked = False, False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Stops now, or after the round that is being trained; a second request stops now."""
        if self._stopping:
            return  # another Stopped would end what the first one lets end
        if not self.training or self.asked:
            self.stop()
        self.asked = True
        # Past this the round is abandoned. Its charge stands.
        signal.setitimer(signal.ITIMER_REAL, max(self._seconds, 1e-3))

    def over(self, number: int, frame: FrameType | None) -> None:
        """Abandons the round, or what still holds up an end."""
        self.stop()

    def stop(self) -> NoReturn:
        """Ends the process.

        Raises:
            Stopped: now, and again as long as a server that does not answer holds it up, or where
                it was raised in a place from which no exception comes out.
        """
        self._stopping = True
        signal.setitimer(signal.ITIMER_REAL, LEAVING_SECONDS, LEAVING_SECONDS)
        raise Stopped


class Answers:
    """Answers orders by the installed ClientApp, the same object as in every grid."""

    def __init__(self, client: ClientApp, context: Context, patience: Patience) -> None:
        self._client, self._context, self.patience = client, context, patience

    def to(self, message: Message) -> Message:
        """Returns the answer to an order.

        Raises:
            NotTaken: for a message of a kind that no site answers.
        """
        try:
            with malloc.kept():  # from step to step: faulting it in anew is dear
                return self._client(message, self._context)
        except Exception as error:
            # The app answers every order it can read; what it cannot is the server's doing.
            raise NotTaken(
                f"a message that is no order ({type(error).__name__})", reason=UNREADABLE
            ) from error


class Journal:
    """What the process last said of itself, for `--status`; public facts alone."""

    def __init__(self, state: SiteState, site: str) -> None:
        self._path, self._site = state.status, site

    def write(self, doing: str, round_number: str | None = None) -> None:
        """Replaces the status file; `round_number` is the server's word, and need not be one."""
        known = round_number is not None and re.fullmatch(r"[0-9]{1,7}|close", round_number)
        facts: dict[str, Any] = {
            "site": self._site,
            "pid": os.getpid(),
            "doing": doing,
            "round": round_number if known else None,
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        try:
            canonical.write_atomically(self._path, canonical.encode(facts), mode=0o600)
        except OSError as error:
            logger.warning("cannot write the status file: %s", error.strerror)


def _serve(connection: Connection, answers: Answers, journal: Journal) -> None:
    # Two, so that the one late answer after a long outage does not wait as long as the outage.
    lost, refused, unsent, told = BackOff(), BackOff(), None, ""
    while True:
        try:
            connection.open()
            logger.info("connected", extra={"event": "connected"})
            told = ""
            journal.write("waiting")
            while True:
                try:
                    if unsent is not None:
                        connection.send(unsent)
                        unsent = None
                    answers.patience.training = False
                    if answers.patience.asked:
                        answers.patience.stop()
                    order = connection.receive()
                    lost.reset()
                    refused.reset()
                    if order is None:
                        continue
                    answers.patience.training = True
                    journal.write("training", order.metadata.group_id)
                    unsent = answers.to(order)
                    journal.write("waiting", order.metadata.group_id)
                except NotTaken as error:
                    # The bytes are stored: asked again for the same round, the gate sends them
                    # again. The connection stands: to open it anew would have the order offered
                    # anew, its time with it.
                    unsent = None
                    event = "not-taken" if error.reason is None else "refused"
                    logger.warning("%s", error, extra={"event": event, "reason": error.reason})
                    refused.wait()
        except Disconnected as error:
            answers.patience.training = False
            if answers.patience.asked:
                answers.patience.stop()
            journal.write("connecting")
            # A server that is away between runs is told of once, not every quarter of a minute.
            level = logging.DEBUG if str(error) == told else logging.INFO
            logger.log(level, "%s; trying again", error, extra={"event": "disconnected"})
            told = str(error)
            lost.wait()


@contextmanager
def _stoppable(chosen: SiteSettings) -> Iterator[Patience]:
    """Lets SIGTERM and SIGINT stop what is done within; after it they are ignored.

    The process ends then. Signals that come while it does would end it by a traceback.
    """
    patience = Patience(chosen.stop_seconds)
    signal.signal(signal.SIGALRM, patience.over)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, patience.ask)
    try:
        yield patience
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
