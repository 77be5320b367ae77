"""Tiny Shakespeare: 1.1 MB of plays, in which a speaking role is a site (Karpathy 2015).

A speech is a line `ROLE:` and the lines up to an empty one. Of a twentieth of the roles the
speeches are validation, of another twentieth test: those are public, and their roles never train.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from bract.shared.data.examples import Examples, Groups, Splits
from bract.shared.data.locations import Source, content, located
from bract.shared.errors import UnknownName, UsageError
from bract.shared.terms import DataTerms

LENGTH: Final = 128  # bytes of an example
SHORTEST: Final = 16  # a block with fewer is left out
NOTHING: Final = -1  # no class: there is no byte to predict

TERMS: Final = DataTerms(
    name="shakespeare", shape=(LENGTH,), classes=256, task="next-token", vocabulary=256
)
SOURCE = Source(
    name="shakespeare",
    base="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
    sha256={"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
    suffix="",
)


@dataclass(frozen=True, slots=True)
class Speech:
    """What a role says at one place: the number of its first line, from 1, and its bytes."""

    row: int
    role: str
    said: bytes


def load_shakespeare(folder: Path | None) -> Splits:
    """Returns blocks of speeches, those that train with their roles as groups.

    Args:
        folder: holds input.txt; found or downloaded where it is None.

    Raises:
        UsageError: where the file is missing or is not the published one.
    """
    validation, test = load_public_speeches(folder)
    return Splits(train=_examples(_published(folder)["train"]), validation=validation, test=test)


def load_public_speeches(folder: Path | None) -> tuple[Examples, Examples]:
    """Returns the speeches of the held-out roles.

    Args:
        folder: holds validation.txt and test.txt, which then are all that is opened, or input.txt.
    """
    paths = [] if folder is None else [folder / "validation.txt", folder / "test.txt"]
    if paths and all(path.exists() for path in paths):
        validation, test = (_speeches(_read(path))[0] for path in paths)
    else:
        parts = _published(folder)
        validation, test = parts["validation"], parts["test"]
    return _examples(validation), _examples(test)


def load_role(folder: Path | None, role: str) -> Examples:
    """Returns the blocks of one role.

    Args:
        folder: holds the role's own train.ROLE.txt, which then is all that is opened, or
            input.txt.
        role: its name as a site's, such as First-Citizen.

    Raises:
        UnknownName: for a role that does not speak or is held out.
        UsageError: where the file is missing.
    """
    return _examples([speech for speech in _own(folder, role)[1] if speech.role == role])


def check_role(folder: Path | None, role: str) -> list[str]:
    """Returns what of a role's own file would not be trained on: by row, without its text."""
    path, speeches, strays = _own(folder, role)
    problems = [(row, "no line ROLE: before it") for row in strays]
    for speech in speeches:
        if speech.role != role:
            problems.append((speech.row, "speech of another role"))
    return [f"{path}, row {row}: {problem}" for row, problem in sorted(problems)]


def site_name(role: bytes | str) -> str:
    """Returns the site's name of a role as the plays write it; case and spaces make no difference.

    Example:
        >>> site_name("LADY  CAPULET"), site_name("First Citizen")
        ('Lady-Capulet', 'First-Citizen')
    """
    text = role.decode("utf-8", errors="replace") if isinstance(role, bytes) else role
    return "-".join(word.capitalize() for word in re.findall("[A-Za-z0-9]+", text))


def held_out(role: str) -> str:
    """Returns the part that a role belongs to, by a hash of its name: a rule that all can follow.

    Example:
        >>> held_out("Romeo")
        'train'
    """
    draw = hashlib.sha256(b"bract/shakespeare/1\0" + role.encode()).digest()[0] % 20
    return {0: "validation", 1: "test"}.get(draw, "train")


def _own(folder: Path | None, role: str) -> tuple[str, list[Speech], list[int]]:
    """Returns a role's file, the speeches in it, and the rows that belong to none.

    Of input.txt only the role's own speeches: the others are no fault there.
    """
    own = None if folder is None else folder / f"train.{role}.txt"
    if own is not None and site_name(role) == role and own.exists():
        if held_out(role) != "train":
            raise UsageError(f"role {role!r} is held out as public: choose another")
        return str(own), *_speeches(_read(own))
    speeches = _published(folder)["train"]
    names = {speech.role for speech in speeches}
    if role not in names:
        raise UnknownName("role that trains,", role, names)
    return "input.txt", [speech for speech in speeches if speech.role == role], []


def _published(folder: Path | None) -> Mapping[str, list[Speech]]:
    folder = located(SOURCE) if folder is None else folder
    parts: dict[str, list[Speech]] = {"train": [], "validation": [], "test": []}
    for speech in _speeches(content(SOURCE, folder, "input.txt"))[0]:
        parts[held_out(speech.role)].append(speech)
    return parts


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; name the folder that holds it"
        ) from error


def _speeches(text: bytes) -> tuple[list[Speech], list[int]]:
    """Returns the speeches of a file, and the first rows of what is none."""
    speeches: list[Speech] = []
    strays: list[int] = []
    for row, lines in _paragraphs(text):
        role = site_name(lines[0]) if lines[0].rstrip().endswith(b":") else ""
        if role:
            speeches.append(Speech(row, role, b"\n".join(lines[1:])))
        else:
            strays.append(row)
    return speeches, strays


def _paragraphs(text: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Yields lines between empty ones, and the number of the first."""
    found: list[bytes] = []
    for row, line in enumerate([*text.split(b"\n"), b""], 1):
        if line.strip():
            found.append(line)
        elif found:
            yield row - len(found), found
            found = []


def _examples(speeches: Sequence[Speech]) -> Examples:
    """Returns the speeches' blocks, in which each byte has the next one as its target.

    A speech begins after a line feed and ends with one; no block reaches over its end: there
    inputs are 0, a byte that no play has, and targets NOTHING.
    """
    names = tuple(dict.fromkeys(speech.role for speech in speeches))
    places = {name: place for place, name in enumerate(names)}
    blocks = [(places[speech.role], block) for speech in speeches for block in _blocks(speech.said)]
    inputs = np.zeros((len(blocks), LENGTH), dtype=np.uint8)
    targets = np.full((len(blocks), LENGTH), NOTHING, dtype=np.int64)
    for row, (_, block) in enumerate(blocks):
        values = np.frombuffer(block, dtype=np.uint8)
        inputs[row, : len(values) - 1] = values[:-1]
        targets[row, : len(values) - 1] = values[1:]
    index = np.array([place for place, _ in blocks], dtype=np.int64)
    return Examples(inputs=inputs, targets=targets, groups=Groups(names, index))


def _blocks(said: bytes) -> Iterator[bytes]:
    """Yields pieces of a speech, each with the one byte more that its last place predicts."""
    text = b"\n" + said + b"\n"
    for start in range(0, len(text) - SHORTEST, LENGTH):
        yield text[start : start + LENGTH + 1]
