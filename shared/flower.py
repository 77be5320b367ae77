"""What either side reads of Flower's object format (1.41), whoever wrote it.

A message travels as a tree of objects, each named by its SHA-256. Tree and objects come from
another machine: their number, their depth and what they grow to are bounded before any is
inflated. Flower's own reader recurses as deep as it is told, and an array that names one chunk a
million times would fill the memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflatable_class_registry,
    inflate_object_from_contents,
)

from bract.shared.errors import VerificationFailed

GREATEST_TREE = 20_000
_NAME = re.compile(r"[0-9a-f]{64}")
# What each kind of object may hold; the wire has no other kinds, so no tree is deeper than this.
_HOLDS = {
    "Message": frozenset({"RecordDict"}),
    "RecordDict": frozenset({"ArrayRecord", "ConfigRecord"}),
    "ArrayRecord": frozenset({"Array"}),
    "Array": frozenset({"ArrayChunk"}),
    "ArrayChunk": frozenset[str](),
    "ConfigRecord": frozenset[str](),
}


class GrewTooLarge(VerificationFailed):
    """A message that would fill more memory than is allowed."""


def parts(tree: ObjectTree) -> list[str]:
    """Returns the names of the objects in a tree, each once, the root first.

    Raises:
        VerificationFailed: where a name is no SHA-256, or there are too many.
    """
    found: dict[str, None] = {}
    left = [tree]
    count = 1
    while left:
        part = left.pop()
        count += len(part.children)
        if count > GREATEST_TREE:
            raise GrewTooLarge(f"a message of over {GREATEST_TREE} objects")
        if not _NAME.fullmatch(part.object_id):
            raise VerificationFailed("an object without a name")
        found[part.object_id] = None
        left.extend(part.children)
    return list(found)


def inflate(root: str, contents: dict[str, bytes], *, greatest: int) -> Message:
    """Returns the message of which these are the objects; it has content, not an error.

    Args:
        root: the name of the message.
        contents: every object by its name; taken out one by one, so that none is held twice.
        greatest: how many bytes all of it may fill.

    Raises:
        GrewTooLarge: where it would fill more.
        VerificationFailed: where it is anything but a message of arrays and configuration.
    """
    try:
        if _size(root, contents, frozenset({"Message"}), {}) > greatest:
            raise GrewTooLarge(f"a message that grows to over {greatest} bytes")
        message = inflate_object_from_contents(root, contents)
        if isinstance(message, Message) and message.has_content():
            return message
    except VerificationFailed:
        raise
    except Exception as error:  # whatever a stranger's bytes make Flower's reader raise
        raise VerificationFailed(f"an unreadable message ({type(error).__name__})") from None
    raise VerificationFailed("a message without content")


def _size(
    name: str, contents: Mapping[str, bytes], kinds: frozenset[str], known: dict[str, int]
) -> int:
    """Returns how many bytes an object fills with all that it refers to, as often as it does."""
    kind, children, _ = get_object_head_values_from_object_content(contents[name])
    if kind not in kinds:
        raise VerificationFailed("a message that holds another kind of object")
    if name not in known:
        size = len(contents[name])
        for child in _references(kind, contents[name], children):
            size += known.get(child) or _size(child, contents, _HOLDS[kind], known)
        known[name] = size
    return known[name]


def _references(kind: str, content: bytes, children: Sequence[str]) -> Sequence[str]:
    if kind not in ("Array", "ArrayRecord", "RecordDict"):
        return children
    held: Any = json.loads(get_object_body(content, inflatable_class_registry[kind]))
    if kind == "Array":
        return [children[place] for place in held["arraychunk_ids"]]
    return list(held.values())
