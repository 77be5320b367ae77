"""receipts.jsonl of a run folder: a line for every update that the server took, in order."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from bract.shared.privacy import receipts
from bract.shared.privacy.receipts import Received

NAME = "receipts.jsonl"


def append(out: Path, found: Sequence[Received]) -> None:
    """Adds receipts to a run folder's file, on disk before this returns."""
    # Nobody but this process adds to it, whatever the umask.
    descriptor = os.open(out / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "ab") as file:
        file.write(receipts.to_lines(found))
        file.flush()
        os.fsync(file.fileno())


def settle(out: Path, *, attempts: int) -> None:
    """Cuts the lines after the last checkpoint: of a round that was killed and is run again."""
    path = out / NAME
    if not path.exists():
        return
    kept = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["attempt"] > attempts:
                break
            kept += len(line)
    with path.open("r+b") as file:
        file.truncate(kept)
        os.fsync(file.fileno())


class Shelf:
    """Finds a site's receipts in a file that grows, without holding them in memory.

    Args:
        out: the run folder.
    """

    def __init__(self, out: Path) -> None:
        self._path, self._end = out / NAME, 0
        self._places: dict[str, list[tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def of(self, site: str, *, attempts: int) -> Iterator[Received]:
        """Yields a site's receipts, as far as a checkpoint of so many attempts holds them."""
        for place, attempt in self._listed(site, attempts):
            if attempt <= attempts:
                with self._path.open("rb") as file:
                    file.seek(place)
                    line = file.readline()
                yield receipts.from_bytes(line.rstrip(b"\n"))

    def _listed(self, site: str, attempts: int) -> tuple[tuple[int, int], ...]:
        with self._lock:
            if self._path.exists():
                self._read_on(attempts)
            return tuple(self._places.get(site, ()))

    def _read_on(self, attempts: int) -> None:
        with self._path.open("rb") as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # half of a line: the other half is being written
                found = receipts.from_bytes(line.rstrip(b"\n"))
                if found.attempt > attempts:
                    return  # not in the checkpoint yet: a kill would take it back
                place = (self._end, found.attempt)
                self._places.setdefault(found.receipt.site, []).append(place)
                self._end += len(line)
