"""Where data sets lie: a root given by the user, the system's folder, or a checked download."""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bract.shared import canonical
from bract.shared.errors import UsageError

SYSTEM_ROOT = Path("/usr/share/datasets")
TIMEOUT_SECONDS = 30.0
# Where a user names a folder: in an experiment, a FEDERATION.toml or a SITE.toml.
NAMED = "data.dir, server.public_data or domains.NAME.data.folder"


@dataclass(frozen=True, slots=True)
class Source:
    """A data set's name, where it is published, and the SHA-256 of each file's content.

    `suffix` is how its files are packed where they are published. `reissued` holds the SHA-256 of
    another known edition of a file, taken where it lies in a folder.
    """

    name: str
    base: str
    sha256: Mapping[str, str]
    suffix: Literal["", ".gz"] = ".gz"
    reissued: Mapping[str, str] = field(default_factory=dict)


def folder_of(name: str, *, folder: Path | None, root: Path | None) -> Path | None:
    """Returns the folder a user named for a data set, or None where they named nothing.

    Args:
        name: of the data set: its folder's name under a root.
        folder: the folder itself, as `data.dir` gives it, or the one file that holds everything.
        root: a folder of data sets, as `--data-dir` or `$BRACT_DATA` gives it.

    Raises:
        UsageError: where the named folder does not exist.
    """
    environment = os.environ.get("BRACT_DATA")
    if folder is not None:
        if not folder.exists():
            raise UsageError(f"no data folder {folder}: correct {NAMED}")
        return folder
    if root is not None:
        if not root.is_dir():
            raise UsageError(f"no data folder {root}: correct --data-dir")
        return root / name if (root / name).is_dir() else None
    if environment and (Path(environment) / name).is_dir():
        return Path(environment) / name
    return None


def located(source: Source) -> Path:
    """Returns a folder that holds a data set: the system's, or a download of it.

    Raises:
        UsageError: where there is none and it cannot be fetched.
    """
    system = SYSTEM_ROOT / source.name
    if system.is_dir():
        return system
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bract"
    return download(source, cache / source.name)


def content(source: Source, folder: Path, name: str) -> bytes:
    """Returns the content of one file in a folder, packed or not.

    Raises:
        UsageError: where it cannot be read, or is not the published one.
    """
    packed, plain = folder / f"{name}.gz", folder / name
    try:
        found = gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    except (OSError, EOFError) as error:
        raise UsageError(
            f"no readable {name} or {name}.gz in {folder}: put it there, or correct {NAMED}, or "
            "--data-dir"
        ) from error
    if hashlib.sha256(found).hexdigest() not in (source.sha256[name], source.reissued.get(name)):
        raise UsageError(f"{folder / name} is not the published file: fetch it again")
    return found


def download(source: Source, folder: Path) -> Path:
    """Returns `folder` filled with a data set's files, each checked by SHA-256 of its content."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, expected in source.sha256.items():
        target = folder / f"{name}{source.suffix}"
        if target.exists():
            continue
        url = f"{source.base}{target.name}"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as reply:  # noqa: S310  https, from a constant
                fetched = reply.read()
            unpacked = gzip.decompress(fetched) if source.suffix == ".gz" else fetched
        except (urllib.error.URLError, OSError, EOFError) as error:
            raise UsageError(
                f"{source.name} is not on this machine and cannot be fetched from {url}: put it "
                f"into a folder and name its parent with --data-dir or BRACT_DATA"
            ) from error
        if hashlib.sha256(unpacked).hexdigest() != expected:
            raise UsageError(f"{url} is not the published file: nothing was kept")
        canonical.write_atomically(target, fetched)
    return folder
