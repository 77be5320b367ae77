"""Text as rows of tokens: bytes, joined pairs of bytes, or a pretrained model's own tokenizer.

Everything a tokenizer knows stands in the contract or in a public file held to its SHA-256.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from bract.shared.data import pretrained
from bract.shared.preparation import Text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ENDED: Final = 0
OF_BYTES: Final = 257
Pair = tuple[int, int]

# A space goes with the word that follows it. What lies in one match is joined, and nothing across
# two; 64 bytes bound what a row can cost.
_WORDS = re.compile(
    rb" ?(?:[A-Za-z0-9\x80-\xff]{1,63}|[^\sA-Za-z0-9\x80-\xff]{1,63})|\s{1,64}",
)


def vocabulary(text: Text) -> int:
    """Returns how many tokens there are.

    Raises:
        UsageError: where a pretrained tokenizer is not there, or is another.
    """
    if text.tokens == "pretrained":
        return max(pretrained.tokenizer(text).get_vocab().values()) + 1
    return OF_BYTES + len(text.merges)


def encode(texts: Sequence[str], text: Text) -> npt.NDArray[np.int32]:
    """Returns tokens of shape (texts, length); never fails for what is in a text.

    Raises:
        UsageError: as `vocabulary` does.

    Example:
        >>> encode(["no"], Text(length=4, labels=("0", "1"))).tolist()
        [[111, 112, 0, 0]]
    """
    one, filling = _encoder(text)
    rows = np.full((len(texts), text.length), filling, dtype=np.int32)
    for place, found in enumerate(texts):
        tokens = one(found)[: text.length]
        rows[place, : len(tokens)] = tokens
    return rows


def decode(tokens: Iterable[int], merges: Sequence[Pair] = ()) -> bytes:
    """Returns the bytes that tokens of bytes or of byte pairs stand for, up to where they end.

    Example:
        >>> decode([257, 112, 0], merges=[(111, 112)])
        b'noo'
    """
    spelled = [b"", *(bytes([byte]) for byte in range(256))]
    for left, right in merges:
        spelled.append(spelled[left] + spelled[right])
    return b"".join(spelled[token] for token in tokens)


def learn_merges(public_texts: Iterable[str], count: int) -> tuple[Pair, ...]:
    """Returns the joins of the most frequent neighbours, one after another (arXiv 1508.07909).

    Only ever of public text: the joins tell what they were learned from. Of equally frequent pairs
    the smallest is taken, so equal texts give equal joins. Fewer than `count` where no pair is
    left that occurs twice.
    """
    found = Counter(word for text in public_texts for word in _WORDS.findall(_bytes(text)))
    neighbours = _Neighbours([([b + 1 for b in word], n) for word, n in sorted(found.items())])
    merges: list[Pair] = []
    while len(merges) < count and (best := neighbours.most_frequent()) is not None:
        neighbours.join_(best, OF_BYTES + len(merges))
        merges.append(best)
    return tuple(merges)


class _Neighbours:
    """How often tokens stand side by side in words, kept up to date while they are joined."""

    def __init__(self, words: list[tuple[list[int], int]]) -> None:
        self._words = words
        self._times: Counter[Pair] = Counter()
        self._places: defaultdict[Pair, set[int]] = defaultdict(set)
        for place in range(len(words)):
            self._count_(place)
        self._waiting = [(-times, pair) for pair, times in self._times.items()]
        heapq.heapify(self._waiting)

    def most_frequent(self) -> Pair | None:
        """Returns the pair to join next, None where none occurs twice."""
        while self._waiting:
            times, pair = self._waiting[0]
            if -times == self._times[pair]:
                return pair if -times > 1 else None
            heapq.heappop(self._waiting)  # counted anew since: it waits under that count too
        return None

    def join_(self, pair: Pair, token: int) -> None:
        """Puts a token in the place of a pair, in every word."""
        changed: set[Pair] = set()
        for place in sorted(self._places.pop(pair)):
            word, times = self._words[place]
            for gone in pairwise(word):
                self._times[gone] -= times
                changed.add(gone)
            self._words[place] = (_join(word, pair, token), times)
            changed.update(self._count_(place))
        for one in changed:
            heapq.heappush(self._waiting, (-self._times[one], one))

    def _count_(self, place: int) -> Iterable[Pair]:
        word, times = self._words[place]
        for pair in pairwise(word):
            self._times[pair] += times
            self._places[pair].add(place)
        return pairwise(word)


def _encoder(text: Text) -> tuple[Callable[[str], Sequence[int]], int]:
    """Returns what makes tokens of one text, and what fills up where it leaves places."""
    if text.tokens == "pretrained":
        return partial(_by_tokenizer, pretrained.tokenizer(text)), ENDED
    if text.tokens == "bytes":
        return lambda found: [byte + 1 for byte in _bytes(found)[: text.length]], ENDED
    ranks = {pair: place for place, pair in enumerate(text.merges)}
    known: dict[bytes, list[int]] = {}

    def joined(found: str) -> list[int]:
        tokens: list[int] = []
        for match in _WORDS.finditer(_bytes(found)):
            if len(tokens) >= text.length:
                break
            word = match[0]
            if word not in known:
                known[word] = _joined(word, ranks)
            tokens += known[word]
        return tokens

    return joined, ENDED


def _by_tokenizer(tokenizer: Tokenizer, found: str) -> Sequence[int]:
    """Returns the tokens of a text; of the empty one where the tokenizer fails on it.

    One text at a time: the library's threads would not outlive the fork of a simulation's workers.
    """
    try:
        return tokenizer.encode(_bytes(found).decode("utf-8")).ids
    except Exception:  # a vocabulary may lack a character, and to fail would tell that it is there
        return tokenizer.encode("").ids


def _joined(word: bytes, ranks: Mapping[Pair, int]) -> list[int]:
    """Returns a word's tokens: its bytes, joined by the earliest merge again and again."""
    tokens = [byte + 1 for byte in word]
    while True:
        known = [pair for pair in pairwise(tokens) if pair in ranks]
        if not known:
            return tokens
        best = min(known, key=ranks.__getitem__)
        tokens = _join(tokens, best, OF_BYTES + ranks[best])


def _join(tokens: list[int], pair: Pair, token: int) -> list[int]:
    joined: list[int] = []
    place = 0
    while place < len(tokens):
        meets = (tokens[place], *tokens[place + 1 : place + 2]) == pair
        joined.append(token if meets else tokens[place])
        place += 2 if meets else 1
    return joined


def _bytes(text: str) -> bytes:
    # JSON can write half a surrogate pair, which UTF-8 cannot.
    return text.encode("utf-8", errors="replace")
