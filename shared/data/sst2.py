"""SST-2: sentences of film reviews, and whether they praise (Socher et al. 2013).

6,920 sentences train, 872 are validation and 1,821 test. The last two are public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from bract.shared.data import labelled, tokens
from bract.shared.data.examples import Examples, Splits
from bract.shared.data.locations import SYSTEM_ROOT, Source, content
from bract.shared.data.pretrained import PACKAGED
from bract.shared.data.shares import faults, rows_of_share
from bract.shared.errors import UsageError
from bract.shared.preparation import Preparation, Text
from bract.shared.terms import DataTerms, Scalar

NAME: Final = "sst2"
LABELS: Final = ("0", "1")  # blames, praises
OTHERWISE: Final[Mapping[str, Scalar]] = {
    "tokens": "pretrained",
    "source": PACKAGED,
    "length": 64,
}

SOURCE = Source(
    name=NAME,
    base="",  # published by nobody under one hash: the files are only ever found
    sha256={
        "train.tsv": "ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920",
        "dev.tsv": "eddea6b39e601dd4e7a672b53cc40fdf6019fa80522f351206c24340ca5d9359",
        "test.tsv": "831169c7e2e429d6026e1bdbb542f33b636e3e596caad9602ebc953c205928b7",
    },
    suffix="",
)


def prepare(
    options: Mapping[str, Scalar], preparation: Preparation | None, where: Path | None
) -> Text:
    """Returns how sentences become tokens; joins of bytes are learned from dev.tsv, a public file.

    Raises:
        UsageError: for a schema, or as `labelled.complete` does.
    """
    if preparation is not None:
        raise UsageError(f"data set {NAME!r} takes no schema: leave it out")

    def public_texts() -> list[str]:
        return [sentence for sentence, _ in _rows(where, "dev.tsv")]

    return labelled.complete(
        options,
        None,
        name=NAME,
        otherwise={**OTHERWISE, "labels": LABELS},
        public_texts=public_texts,
    )


def load_sst2(terms: DataTerms, folder: Path | None) -> Splits:
    """Returns the three published parts.

    Args:
        terms: as the contract has them.
        folder: holds train.tsv, dev.tsv and test.tsv.

    Raises:
        UsageError: where a file is missing or is not the published one.
    """
    validation, test = load_public_sentences(terms, folder)
    return Splits(train=_examples(terms, folder, "train.tsv"), validation=validation, test=test)


def load_public_sentences(terms: DataTerms, folder: Path | None) -> tuple[Examples, Examples]:
    """Returns validation and test; train.tsv is not opened."""
    return _examples(terms, folder, "dev.tsv"), _examples(terms, folder, "test.tsv")


def load_part(terms: DataTerms, folder: Path | None, part: str) -> Examples:
    """Returns a share of the training sentences, "i/n"; opens no other file than train.tsv."""
    train = _rows(folder, "train.tsv")
    return _encoded(terms, [train[place] for place in rows_of_share(len(train), part)])


def check_part(terms: DataTerms, folder: Path | None, part: str) -> list[str]:
    """Returns what is wrong with a share, without its values."""
    return faults(load_part(terms, folder, part), classes=terms.classes, where=f"{NAME} {part}")


def _examples(terms: DataTerms, folder: Path | None, name: str) -> Examples:
    return _encoded(terms, _rows(folder, name))


def _encoded(terms: DataTerms, rows: Sequence[tuple[str, str]]) -> Examples:
    text = labelled.of(terms)
    known = {label: place for place, label in enumerate(text.labels)}
    return Examples(
        inputs=tokens.encode([sentence for sentence, _ in rows], text),
        targets=np.array([known.get(label, -1) for _, label in rows], dtype=np.int64),
    )


def _rows(folder: Path | None, name: str) -> list[tuple[str, str]]:
    """Returns the sentences and labels of a file as it was published."""
    folder = SYSTEM_ROOT / NAME if folder is None else folder
    if not folder.is_dir():
        raise UsageError(
            "sst2 is not on this machine: put train.tsv, dev.tsv and test.tsv (sentence, tab, 0 or "
            "1; 6,920, 872 and 1,821 lines, as in data/SST2 of "
            "github.com/clairett/pytorch-sentiment-classification) into ROOT/sst2 and name ROOT "
            "with --data-dir or BRACT_DATA"
        )
    lines = content(SOURCE, folder, name).decode("utf-8").splitlines()
    cells = [line.rpartition("\t") for line in lines]
    return [(sentence, label) for sentence, _, label in cells]
