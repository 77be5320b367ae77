"""An exported ledger: one canonical JSON object a line, to be read where no SQLite file should go.

It holds what the file holds: entries with their signatures, the contracts and policies that they
name, witnesses; and, last, the head of each chain, so that a copy that broke off is noticed. No
part of it is secret. What binds it is what binds a ledger: the pinned key, and heads seen
elsewhere.

header    {"bract": "ledger", "schema_version"}
document  {"kind": "contract" or "policy", "sha256", "document"}
entry     {"kind": "entry", "body", "signature"}
witness   {"kind": "witness", "witness"}
head      {"kind": "head", "site", "domain", "sequence", "hash"}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bract.shared import canonical
from bract.shared.errors import LedgerError, VerificationFailed
from bract.shared.privacy import entries
from bract.shared.privacy.contents import Contents, read

_SQLITE = b"SQLite format 3\0"
_HEADER = {"bract": "ledger", "schema_version": entries.SCHEMA_VERSION}
Name = tuple[str, str]


def contents(path: Path) -> Contents:
    """Returns what a ledger holds, be it the SQLite file or an export of it; not yet verified.

    Raises:
        LedgerError: where it is neither, or of another schema.
        VerificationFailed: where a line of an export is not what `to_bytes` writes.
    """
    if not path.is_file():
        raise LedgerError(f"no ledger at {path}: name the .sqlite file, or an export of it")
    with path.open("rb") as file:
        start = file.read(len(_SQLITE))
    if start == _SQLITE or not start.startswith(b"{"):
        return read(path)
    return from_bytes(path.read_bytes(), source=str(path))


def to_bytes(held: Contents) -> bytes:
    """Returns a ledger's contents as the lines of an export.

    Raises:
        VerificationFailed: where a part is not canonical, so that writing it anew would mend it.
    """
    try:
        return b"".join(canonical.encode(line) + b"\n" for line in _lines(held))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VerificationFailed("an entry, a document or a witness cannot be read") from error


def from_bytes(text: bytes, *, source: str = "export") -> Contents:
    """Returns the contents in an export; no signature and no chain is verified yet.

    Raises:
        LedgerError: where it is no export, or of another schema.
        VerificationFailed: naming the first line that is not canonical or not in its place, or a
            head that is not that of its chain.
    """
    header, *lines = text.split(b"\n")
    _check_header(header, source)
    if not lines or lines.pop() != b"":
        raise VerificationFailed("cut short, its last line is not whole")
    held = Contents(rows={}, documents={}, witnesses={})
    heads: dict[Name, dict[str, Any]] = {}
    place: tuple[Any, ...] = ()
    for number, line in enumerate(lines, start=2):
        try:
            before, place = place, _take_(held, heads, canonical.decode(line))
            if place < before:
                raise VerificationFailed("not in its place")
        except (VerificationFailed, KeyError, TypeError, ValueError, AttributeError) as error:
            fault = error if isinstance(error, VerificationFailed) else "not a line of an export"
            raise VerificationFailed(f"line {number}: {fault}") from error
    if {name: _head(rows) for name, rows in held.rows.items()} != heads:
        raise VerificationFailed("cut short or mixed, its heads are not its entries'")
    return held


def _lines(held: Contents) -> Iterator[dict[str, Any]]:
    yield _HEADER
    for (kind, sha256), text in sorted(held.documents.items()):
        yield {"kind": kind, "sha256": sha256, "document": canonical.decode(text)}
    for (site, domain), rows in sorted(held.rows.items()):
        for sequence, text, signature in rows:
            body = canonical.decode(text)
            _check_place((body["site"], body["domain"], body["sequence"]), (site, domain, sequence))
            yield {"kind": "entry", "body": body, "signature": signature.hex()}
    for place, text in sorted(held.witnesses.items()):
        seen = canonical.decode(text)
        _check_place((seen["site"], seen["domain"], seen["key"]), place)
        yield {"kind": "witness", "witness": seen}
    for name in sorted(held.rows):
        yield {"kind": "head", **_head(held.rows[name])}


def _check_place(found: tuple[Any, ...], stored: tuple[Any, ...]) -> None:
    if found != stored:
        raise VerificationFailed(f"{found} is stored as {stored}")


def _take_(
    held: Contents, heads: dict[Name, dict[str, Any]], line: dict[str, Any]
) -> tuple[Any, ...]:
    """Adds a line and returns its place in the order of an export."""
    place: tuple[Any, ...]
    match line.pop("kind"):
        case "contract" | "policy" as kind:
            document, name = line.pop("document"), (kind, line.pop("sha256"))
            place = (0, *name)
            _put_once_(held.documents, name, canonical.encode(document))
        case "entry":
            body, signature = line.pop("body"), line.pop("signature")
            place = (1, body["site"], body["domain"])
            rows = held.rows.setdefault((body["site"], body["domain"]), [])
            # The hexadecimal digits have a second spelling, which is none of ours.
            if bytes.fromhex(signature).hex() != signature:
                raise VerificationFailed("a signature in another spelling")
            rows.append((body["sequence"], canonical.encode(body), bytes.fromhex(signature)))
        case "witness":
            seen = line.pop("witness")
            place = (2, seen["site"], seen["domain"], seen["key"])
            _put_once_(held.witnesses, place[1:], canonical.encode(seen))
        case "head":
            place = (3, line["site"], line["domain"])
            _put_once_(heads, place[1:], dict(line))
            line.clear()
        case _:
            raise VerificationFailed("an unknown kind of line")
    if line:
        raise VerificationFailed("a line with more in it than its kind has")
    return place


def _put_once_(where: dict[Any, Any], name: Any, value: Any) -> None:
    if name in where:
        raise VerificationFailed("stands there a second time")
    where[name] = value


def _head(rows: list[tuple[int, bytes, bytes]]) -> dict[str, Any]:
    sequence, text, _ = rows[-1]
    body = entries.body(text)
    return {
        "site": body.site,
        "domain": body.domain,
        "sequence": sequence,
        "hash": entries.hash_of(text),
    }


def _check_header(line: bytes, source: str) -> None:
    try:
        found = canonical.decode(line)
        version = found["schema_version"] if found["bract"] == "ledger" else None
    except (VerificationFailed, KeyError, TypeError) as error:
        raise LedgerError(f"{source} is neither a ledger nor an export of one") from error
    if found != _HEADER:
        raise LedgerError(
            f"{source} has ledger schema {version}, this bract reads {entries.SCHEMA_VERSION}: "
            "use the bract that wrote it, or a newer one"
        )
