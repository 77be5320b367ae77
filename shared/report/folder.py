"""What lies in the folder of a run, of a whole federation, or of one of its sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bract.shared.errors import BractError, UsageError
from bract.shared.privacy import anchors, export
from bract.shared.privacy.entries import Head

# A run's own folder first: what a federation's server left is the run of the whole.
_RUNS = (".", "coordinator/run", "coordinator")
_LEDGERS = ("ledgers/*.sqlite", "sites/*/state/ledger.sqlite", "state/ledger.sqlite")
_EXPORTS = "ledgers/*.jsonl"

Heads = Mapping[tuple[str, str], Head]


@dataclass(frozen=True, slots=True)
class LedgerFile:
    """A ledger and, by their names, the files beside it that may hold its head, or a copy of it.

    `site` is whose it is by where it lies.
    """

    path: Path
    name: str
    site: str
    heads: Mapping[str, Path]
    copies: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Folder:
    """The files of a run; None where there is none of a kind.

    `name` is the folder's own, which is all that the page says of where it lay.
    """

    name: str
    contract: Path
    ledgers: tuple[LedgerFile, ...]
    summary: Path | None
    metrics: Path | None
    model: Path | None
    received: Path | None
    witnesses: Path | None
    mechanism: Path | None
    membership: Path | None
    agreement: Path | None


def find(
    root: Path, *, mechanism: Path | None, membership: Path | None, agreement: Path | None
) -> Folder:
    """Returns what lies in a folder; reads none of it.

    Args:
        root: `runs/NAME` of `bract simulate`, the folder of a federation that holds coordinator/
            and sites/, one site's that holds state/, or one that an auditor pulled. Ledgers, or
            exports of them, lie in its ledgers/.
        mechanism: the folder with audit.json; `root` where it is None.
        membership: the folder with membership.json; `root` where it is None.
        agreement: the file with a table of ε by several accountants; `root`'s agreement.json where
            it is None.

    Raises:
        UsageError: where the folder holds no contract, or an option names nothing.
    """
    if not root.is_dir():
        raise UsageError(f"no folder {root}: name a run's, a federation's or a site's")
    contract = _first(root, "contract.json")
    if contract is None:
        raise UsageError(f"{root} holds no contract.json: name a run's folder, or a federation's")
    files = [path for pattern in _LEDGERS for path in sorted(root.glob(pattern))]
    # What lies beside the file that it was made from is not another ledger, but a copy.
    files += [
        path for path in sorted(root.glob(_EXPORTS)) if path.with_suffix(".sqlite") not in files
    ]
    return Folder(
        name=root.resolve().name,
        contract=contract,
        ledgers=tuple(_ledger(root, path) for path in files),
        summary=_first(root, "summary.json"),
        metrics=_first(root, "metrics.jsonl"),
        model=_first(root, "model.safetensors"),
        received=_first(root, "receipts.jsonl"),
        witnesses=_first(root, "witnesses.json"),
        mechanism=_named(root, mechanism, "audit.json", "--experiment"),
        membership=_named(root, membership, "membership.json", "--membership"),
        agreement=_given(agreement, "--agreement") if agreement else _own(root, "agreement.json"),
    )


def heads(file: LedgerFile) -> dict[str, Heads]:
    """Returns the heads seen elsewhere, by the name of the file that holds them."""
    found = {name: anchors.heads(path) for name, path in file.heads.items()}
    return {name: held for name, held in found.items() if held}


def content_of(path: Path) -> bytes | None:
    """Returns a file's bytes, None where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def sites_in(path: Path) -> list[str]:
    """Returns the sites that a ledger file names, unverified; none where it cannot be read."""
    try:
        return sorted({site for site, _ in export.contents(path).rows})
    except (BractError, ValueError, TypeError, AttributeError):
        return []


def _ledger(root: Path, path: Path) -> LedgerFile:
    beside = path.parent.parent / "head.json"
    of_site = path.parent.name == "state"
    seen = [beside] if of_site and beside.exists() else []
    runs = [root / place / "summary.json" for place in _RUNS]
    summaries = [path for path in runs if path.exists()]
    # A run that was stopped has no summary yet; its checkpoint holds the heads last signed.
    states = [root / place / "checkpoint" / "state.json" for place in _RUNS]
    seen += summaries or [path for path in states if path.exists()]
    copy = path.with_suffix(".jsonl")
    copies = [copy] if copy != path and copy.is_file() else []
    return LedgerFile(
        path=path,
        name=str(path.relative_to(root)),
        site=path.resolve().parent.parent.name if of_site else path.stem,
        heads={str(file.relative_to(root)): file for file in seen},
        copies={str(file.relative_to(root)): file for file in copies},
    )


def _first(root: Path, name: str) -> Path | None:
    return next((root / place / name for place in _RUNS if (root / place / name).exists()), None)


def _named(root: Path, folder: Path | None, name: str, option: str) -> Path | None:
    if folder is not None:
        return _given(folder / name, option)
    return _own(root, name)


def _own(root: Path, name: str) -> Path | None:
    return root / name if (root / name).exists() else None


def _given(path: Path, option: str) -> Path:
    if not path.is_file():
        raise UsageError(f"no {path}: correct {option}")
    return path
