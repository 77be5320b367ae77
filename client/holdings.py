"""What a site holds: the only way to its examples, bound to the domains that count them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from bract.client.settings import DataRoot
from bract.shared import canonical
from bract.shared.configuration import parse
from bract.shared.data import Examples, check_part, dataset, load_part
from bract.shared.data.shares import may_meet
from bract.shared.errors import BractError, Reason, Refusal, UsageError
from bract.shared.policy import Policy
from bract.shared.terms import DataTerms


class Holdings(Protocol):
    """The data behind a gate."""

    def check(self, domain: str, data: DataTerms) -> None:
        """Returns where a domain holds the kind of data that a contract is for; reads none.

        Raises:
            Refusal: otherwise, and where they are not in their place now.
        """

    def open(self, domain: str, data: DataTerms) -> Examples:
        """Returns the examples of a domain, prepared as a contract's terms say."""


class Roots:
    """The data roots of SITE.toml.

    Args:
        roots: where the data of each domain lie.
    """

    def __init__(self, roots: Mapping[str, DataRoot]) -> None:
        self._roots = dict(roots)

    def check(self, domain: str, data: DataTerms) -> None:
        """Returns where a domain holds the contract's data set in the contract's shape."""
        root = self._roots.get(domain)
        if root is None or root.name != data.name:
            raise Refusal(Reason.POLICY_DOMAIN, f"domain {domain!r} holds no {data.name!r} data")
        if not dataset(root.name).fits(data):
            raise Refusal(
                Reason.POLICY_DOMAIN, f"{data.name!r} has another shape than the contract says"
            )
        place = _place(root)
        # A disk that is not mounted may be there in the next round: the reason is a passing one.
        if place is not None and not os.access(place, os.R_OK):
            raise Refusal(
                Reason.SITE_FAILED,
                f"cannot read {place}, where domains.{domain}.data of SITE.toml lie: mount it or "
                "put it back; nothing was charged",
            )

    def open(self, domain: str, data: DataTerms) -> Examples:
        """Returns the examples of a domain, read once in a process."""
        root = self._roots[domain]
        try:
            return _open(data, root.folder, root.part)
        except UsageError as error:
            raise UsageError(f"domains.{domain}.data of SITE.toml: {error}") from error

    def problems(self, domain: str, data: DataTerms, nominal_size: int) -> list[str]:
        """Returns what an operator should mend, by file, row and column and never by value.

        Reads the true data, so it is for the operator's eyes alone, before the site is offered.
        """
        root = self._roots[domain]
        folder = Path(root.folder) if root.folder else None
        try:
            return check_part(data, folder, root.part, nominal_size)
        except BractError as error:
            return [str(error)]


def bind(roots: Mapping[str, DataRoot], policy: Policy, path: Path) -> None:
    """Fixes which data each domain counts; a renamed domain is no new budget.

    Args:
        roots: where the data of each domain lie.
        policy: says which domains share examples.
        path: the record of earlier bindings; made where it is missing.

    Raises:
        UsageError: as `bindings` raises it.
    """
    bound = bindings(roots, policy, path)
    if bound != _recorded(path):
        facts = {domain: root.model_dump() for domain, root in bound.items()}
        canonical.write_atomically(path, canonical.encode(facts), mode=0o600)


def bindings(roots: Mapping[str, DataRoot], policy: Policy, path: Path) -> dict[str, DataRoot]:
    """Returns which data each domain counts, earlier domains included; nothing is written.

    Raises:
        UsageError: where a domain's data moved, or data that a domain counts are offered under
            another domain that does not share its budget.
    """
    earlier = _recorded(path)
    now = {domain: _canonical(root) for domain, root in roots.items()}
    for domain, root in now.items():
        if earlier.get(domain, root) != root:
            raise UsageError(
                f"domain {domain!r} counted {_shown(earlier[domain])} and now names "
                f"{_shown(root)}: data that moved keep their domain under their old path, other "
                "data need another domain"
            )
    bound = {**earlier, **now}
    for domain in now:
        for other, root in bound.items():
            shared = other in policy.domains and other in policy.charged_domains(domain)
            if other != domain and not shared and _meet(now[domain], root):
                raise UsageError(
                    f"domains {domain!r} and {other!r} count the same data ({_shown(root)}): keep "
                    f"one, or declare overlaps = [{other!r}], so that one use is charged to both"
                )
    return bound


def _place(root: DataRoot) -> Path | None:
    """Returns what must be there to open a root; None where its data are found by their name."""
    known = dataset(root.name)
    return None if root.folder is None or known.embedded else known.private(Path(root.folder))


def _recorded(path: Path) -> dict[str, DataRoot]:
    try:
        facts = canonical.decode(path.read_bytes()) if path.exists() else {}
        return {domain: parse(DataRoot, root, source=str(path)) for domain, root in facts.items()}
    except (OSError, AttributeError, BractError) as error:
        raise UsageError(
            f"{path} is no readable record of which data each domain counts: put it back from its "
            "backup; without it a renamed domain would be a new budget"
        ) from error


def _canonical(root: DataRoot) -> DataRoot:
    # A folder says nothing of data that ship with a library: they are the same under any.
    if root.folder is None or dataset(root.name).embedded:
        return root.model_copy(update={"folder": None})
    return root.model_copy(update={"folder": str(Path(root.folder).resolve())})


def _meet(one: DataRoot, other: DataRoot) -> bool:
    """Returns whether two roots may hold the same examples: one folder within the other."""
    if one.folder is None or other.folder is None:
        # Data that are found by their name may lie in any folder that another domain names.
        return one.name == other.name and may_meet(one.part, other.part)
    if one.folder == other.folder and one.name == other.name:
        return may_meet(one.part, other.part)
    paths = Path(one.folder), Path(other.folder)
    return paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0])


def _shown(root: DataRoot) -> str:
    return f"{root.folder or root.name}, part {root.part}"


@lru_cache(maxsize=4)
def _open(data: DataTerms, folder: str | None, part: str) -> Examples:
    return load_part(data, Path(folder) if folder else None, part)
