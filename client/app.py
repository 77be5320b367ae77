"""The ClientApp: the same object in every grid.

Which site it is comes from the node's own configuration, never from a message: `site-factory`
names an installed `module:function` that opens the site. Where Flower's simulation engine makes the
configuration, the node's environment names it, which no message can set either.
"""

from __future__ import annotations

import importlib
import logging
import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from bract.client.site import Site
from bract.shared import wire
from bract.shared.errors import BractError, LedgerError, Reason, Refusal, UsageError
from bract.shared.messages import RefusalReply

logger = logging.getLogger("bract.client")

FACTORY_VARIABLE = "BRACT_SITE_FACTORY"

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answers one train order: through the gate, or with a refusal."""
    try:
        site = _site(context)
    except LedgerError as error:  # a full disk, say: a site without its ledger charges nothing
        return Message(wire.encode_refusal(_unopened(context, error)), reply_to=message)
    try:
        reply = site.train(wire.decode_order(message.content))
    except Exception as error:  # an order is the server's: what it makes a reader raise is refused
        reply = _untrusted(site, error)
    content = (
        wire.encode_refusal(reply) if isinstance(reply, RefusalReply) else wire.encode_reply(reply)
    )
    return Message(content, reply_to=message)


@app.query()
def close(message: Message, context: Context) -> Message:
    """Keeps the last witness of a run."""
    site = _site(context)
    try:
        order = wire.decode_close(message.content)
        site.gate.keep_witness(order.contract, order.witness)
        content = wire.encode_closed(site.name)
    except Refusal as refusal:
        logger.warning(
            "%s",
            refusal,
            extra={"event": "refused", "site": site.name, "reason": refusal.reason.value},
        )
        content = wire.encode_refusal(RefusalReply(site.name, 0, refusal.reason))
    except Exception as error:
        content = wire.encode_refusal(_untrusted(site, error))
    return Message(content, reply_to=message)


def _untrusted(site: Site, error: Exception) -> RefusalReply:
    reason = Reason.CONTRACT_UNTRUSTED
    logger.warning(
        "an order that cannot be read: %s",
        error if isinstance(error, BractError) else type(error).__name__,
        extra={"event": "refused", "site": site.name, "reason": reason.value},
    )
    return RefusalReply(site=site.name, round=0, reason=reason)


def _unopened(context: Context, error: LedgerError) -> RefusalReply:
    reason = Reason.LEDGER_UNAVAILABLE
    logger.error("%s", error, extra={"event": "refused", "reason": reason.value})
    return RefusalReply(site=f"node {context.node_id}", round=0, reason=reason)


def _site(context: Context) -> Site:
    name = context.node_config.get("site-factory") or os.environ.get(FACTORY_VARIABLE)
    module, colon, function = str(name).partition(":")
    if not colon:
        raise UsageError(
            "this node has no site-factory: start it by `bract simulate`, or name one in its "
            "--node-config"
        )
    site = getattr(importlib.import_module(module), function)(context)
    if not isinstance(site, Site):
        raise UsageError(f"{name} opened no site")
    return site
