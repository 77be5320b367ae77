"""What an auditor holds against a ledger: pinned keys, and heads seen elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from bract.shared import canonical, contract
from bract.shared.errors import UsageError, VerificationFailed
from bract.shared.privacy import export, head_file, witness
from bract.shared.privacy.entries import Head
from bract.shared.privacy.witness import Witness


def site_keys(path: Path, site_key: str | None, beside: Path) -> Mapping[str, str]:
    """Returns the pinned key of each site in a ledger.

    Args:
        path: the ledger.
        site_key: the key that the user pins, for every site in the file.
        beside: contract.json of the run folder, or one that the user pins; its signature must
            hold.

    Raises:
        VerificationFailed: where there is neither.
    """
    if site_key is not None:
        if not re.fullmatch(r"[0-9a-f]{64}", site_key):
            raise UsageError(f"--site-key {site_key!r} must be 64 hexadecimal digits")
        return {site: site_key for site, _ in export.contents(path).rows}
    if not beside.exists():
        raise VerificationFailed(
            f"{path}: key not pinned: give --site-key or --contract, or keep the ledger in its run "
            "folder beside contract.json"
        )
    signed = contract.read(beside)
    agreed = signed.verify(signed.contract.coordinator)
    return {site.name: site.key for site in agreed.cohort}


def heads(path: Path) -> Mapping[tuple[str, str], Head]:
    """Returns the heads in a summary, a checkpoint or a head file, by (site, domain).

    Args:
        path: JSON with `heads`: {SITE: {domain, sequence, hash}}, or a list of them for a site;
            none where it has `witnesses` alone.

    Raises:
        UsageError: where the file is missing or is of another form.
    """
    try:
        found = json.loads(path.read_bytes())
        return {} if "witnesses" in found and "heads" not in found else head_file.heads(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} holds no heads: name a summary.json or a head file") from error


def witnesses(path: Path) -> tuple[Witness, ...]:
    """Returns the countersigned heads in a file that `to_bytes` wrote, none in one of heads alone.

    Raises:
        UsageError: where the file is missing or is no JSON.
        VerificationFailed: where a witness is of another form; no signature is looked at.
    """
    try:
        found = json.loads(path.read_bytes()).get("witnesses", [])
        return tuple(witness.from_bytes(canonical.encode(one)) for one in found)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} holds no heads: name a summary.json or a head file") from error


def witness_keys(contract_file: Path) -> frozenset[str]:
    """Returns the key of the server that a signed contract names, none where there is no file.

    Raises:
        VerificationFailed: where its signature does not hold.
    """
    if not contract_file.exists():
        return frozenset()
    signed = contract.read(contract_file)
    agreed = signed.verify(signed.contract.coordinator)
    return frozenset([agreed.witness] if agreed.witness else [])


def to_bytes(found: Iterable[Witness]) -> bytes:
    """Returns witnesses as the file that `--head` takes: {"witnesses": […]}."""
    return canonical.encode({"witnesses": [one.model_dump(mode="json") for one in found]})
