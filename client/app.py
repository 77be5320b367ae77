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
from bract.shared.errors import BractError, Reason, Refusal, UsageError

logger = logging.getLogger("bract.client")

FACTORY_VARIABLE = "BRACT_SITE_FACTORY"

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answers one train order: through the gate, or with a refusal."""
    site = _site(context)
    try:
        reply = site.train(wire.decode_order(message.content))
    except BractError:
        reply = wire.RefusalReply(site=site.name, round=0, reason=Reason.CONTRACT_UNTRUSTED)
    content = (
        wire.encode_refusal(reply)
        if isinstance(reply, wire.RefusalReply)
        else wire.encode_reply(reply)
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
        logger.warning("%s", refusal, extra={"site": site.name, "reason": refusal.reason.value})
        content = wire.encode_refusal(wire.RefusalReply(site.name, 0, refusal.reason))
    except BractError:
        reply = wire.RefusalReply(site=site.name, round=0, reason=Reason.CONTRACT_UNTRUSTED)
        content = wire.encode_refusal(reply)
    return Message(content, reply_to=message)


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
