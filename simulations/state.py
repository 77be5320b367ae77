"""What simulated sites keep: ledgers, keys and stored updates, under one lock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bract.shared import canonical, keys, locks
from bract.shared.errors import UsageError

SHARED_FILE_FROM = 100


@dataclass(frozen=True, slots=True)
class State:
    """The folders of the sites' lasting state.

    `ledgers` holds SITE.sqlite, or all.sqlite for 100 sites and more and where a whole site is
    protected; `private` holds keys, updates and what the state was begun with. Sites that share a
    ledger file have their keys from one, and keep no update: a round that was killed is charged
    again.
    """

    ledgers: Path
    private: Path

    @classmethod
    def under(cls, root: Path) -> State:
        """Returns the state in a folder of its own, as `--state` names it."""
        return cls(ledgers=root / "ledgers", private=root / "private")

    @classmethod
    def of_run(cls, out: Path) -> State:
        """Returns the state of a run that shares it with no other: it lies in the run folder."""
        return cls(ledgers=out / "ledgers", private=out / "state")

    def shares_a_file(self, site: str, *, many: bool) -> bool:
        """Returns whether a site, one of many, keeps its chains beside the others'."""
        # What a site has charged in a file of its own is never left behind.
        return many and site not in _names(self.ledgers, "", ".sqlite")

    def ledger(self, site: str, *, many: bool) -> Path:
        """Returns the ledger file of a site."""
        return self.ledgers / f"{'all' if self.shares_a_file(site, many=many) else site}.sqlite"

    def site_key(self, site: str, *, many: bool) -> keys.SigningKey:
        """Returns the key of a site, made where there is none yet."""
        if not self.shares_a_file(site, many=many) or site in _names(self.private, "keys/", ".pem"):
            return keys.load_or_generate(self.key(site))
        return keys.derived(_root(self), site)

    def key(self, name: str) -> Path:
        """Returns the file of a signing key."""
        return self.private / "keys" / f"{name}.pem"

    def updates(self, site: str) -> Path:
        """Returns the folder of a site's stored update."""
        return self.private / "updates" / site

    def prepare(self) -> None:
        """Makes the folders, and looks anew at what lies in them."""
        _names.cache_clear()
        self.ledgers.mkdir(parents=True, exist_ok=True)
        (self.private / "keys").mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.private / "updates").mkdir(exist_ok=True, mode=0o700)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the state for one process and its workers; they inherit the lock.

        Waits a little, for the workers of a killed run to notice that they are orphans.

        Raises:
            BractError: where another run holds it.
        """
        remedy = "wait for that run to end, or name another --state or --out"
        with locks.held(self.private / "lock", remedy):
            yield

    def bind(self, facts: dict[str, Any]) -> None:
        """Fixes the facts that decide the state's data domain; they never change afterwards.

        Raises:
            UsageError: where another partition of the data would be counted as the same domain.
        """
        path = self.private / "domain.json"
        self.check(facts)
        if not path.exists():
            canonical.write_atomically(path, canonical.encode(facts))

    def check(self, facts: dict[str, Any]) -> None:
        """Returns where the state is new or was begun with the same facts; writes nothing."""
        path = self.private / "domain.json"
        if not path.exists():
            return
        try:
            begun = json.loads(path.read_bytes())
        except ValueError as error:
            raise UsageError(f"{path} is damaged: put it back; use another --state") from error
        different = sorted(
            name for name in begun.keys() | facts.keys() if begun.get(name) != facts.get(name)
        )
        if different:
            name = different[0]
            raise UsageError(
                f"{self.private.parent} was begun with {name} {begun.get(name)!r}, this run has "
                f"{facts.get(name)!r}: another partition is another domain; use another --state"
            )


@lru_cache(maxsize=8)
def _names(folder: Path, within: str, suffix: str) -> frozenset[str]:
    """Returns the names of a folder's files, without their suffix; thousands of sites ask."""
    return frozenset(path.stem for path in folder.glob(f"{within}*{suffix}"))


@lru_cache(maxsize=4)
def _root(state: State) -> keys.SigningKey:
    return keys.load_or_generate(state.key("sites"))
