"""The last head of each chain, kept apart from the ledger so that an older copy is noticed.

With it lies the greatest ε that each domain was ever allowed: what was lost may have cost so much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bract.shared import canonical
from bract.shared.errors import BractError, LedgerUnwritable, UsageError
from bract.shared.privacy.entries import Head


class HeadFile:
    """A JSON file {"heads": {SITE: [{domain, sequence, hash}]}}, replaced after every commit.

    A site's own has {"ceilings": {SITE: {DOMAIN: ε}}} too. It is what `bract audit verify --head`
    takes. On the ledger's own disk it would be put back together with it.

    Args:
        path: the file; its folder is made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()  # what a link names is replaced, and not the link
        self._ceilings: dict[tuple[str, str], float] = {}

    def read(self) -> dict[tuple[str, str], Head]:
        """Returns the heads, none where the file was never written.

        Raises:
            UsageError: where the file holds anything else.
        """
        if not self._path.exists():
            return {}
        try:
            found = canonical.decode(self._path.read_bytes())
            self._ceilings = {
                (site, domain): float.fromhex(ceiling)
                for site, ceilings in found.get("ceilings", {}).items()
                for domain, ceiling in ceilings.items()
            }
            return heads(found)
        except (OSError, KeyError, TypeError, ValueError, AttributeError, BractError) as error:
            raise UsageError(
                f"{self._path} is no readable head file: put it back from its backup; without it a "
                "ledger that lost entries would not be noticed"
            ) from error

    def allow(self, site: str, ceilings: Mapping[str, float]) -> None:
        """Notes the ε that a site's domains are allowed, before anything is charged within it.

        Raises:
            UsageError, LedgerUnwritable: where the file cannot be read or written.
        """
        seen = self.read()
        raised = {
            (site, domain): ceiling
            for domain, ceiling in ceilings.items()
            if ceiling > self.ceiling(site, domain)
        }
        if raised:
            self._ceilings |= raised
            self.write(seen)

    def ceiling(self, site: str, domain: str) -> float:
        """Returns the greatest ε that a domain was allowed as far as the file knows, else 0."""
        return self._ceilings.get((site, domain), 0.0)

    @contextmanager
    def replaced(self, seen: Mapping[tuple[str, str], Head]) -> Iterator[None]:
        """Replaces the heads after a block that commits what they name; before it they are ready.

        A disk that is full or read-only so shows before anything is charged.

        Raises:
            LedgerUnwritable: where the file cannot be written.
        """
        by_site: dict[str, list[dict[str, Any]]] = {}
        for (site, domain), head in sorted(seen.items()):
            by_site.setdefault(site, []).append(
                {"domain": domain, "sequence": head.sequence, "hash": head.hash}
            )
        value: dict[str, Any] = {"heads": by_site}
        for (site, domain), ceiling in sorted(self._ceilings.items()):
            value.setdefault("ceilings", {}).setdefault(site, {})[domain] = ceiling.hex()
        committed = False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with canonical.replacing(self._path, canonical.encode(value)):
                yield
                committed = True
        except OSError as error:
            kept = "the charge stands" if committed else "nothing was charged"
            raise LedgerUnwritable(
                f"cannot write {self._path}: {error.strerror}; make room or mend its rights; {kept}"
            ) from error

    def write(self, seen: Mapping[tuple[str, str], Head]) -> None:
        """Replaces the heads; raises as `replaced` does."""
        with self.replaced(seen):
            pass


def heads(value: Any) -> dict[tuple[str, str], Head]:
    """Returns the heads in a head file, a summary or a checkpoint, by (site, domain).

    A site has one head, or a list of one for each of its domains.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: for anything else.
    """
    return {
        (site, _text(head["domain"])): Head(_number(head["sequence"]), _text(head["hash"]))
        for site, listed in value["heads"].items()
        for head in (listed if isinstance(listed, list) else [listed])
    }


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a head's domain and hash are text")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a head's sequence number is a whole number from 0")
    return value
