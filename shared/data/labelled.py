"""Terms of labelled text: what the data sets `text` and `sst2` have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, get_args

from bract.shared.configuration import parse
from bract.shared.data import pretrained, tokens
from bract.shared.errors import UnknownName, UsageError
from bract.shared.preparation import Text
from bract.shared.terms import DataTerms, Scalar

OPTIONS: Final = ("length", "merges", "source", "tokens")
_MERGES: Final = 2_000  # learned where the option says nothing


def complete(
    options: Mapping[str, Scalar],
    given: Text | None,
    *,
    name: str,
    otherwise: Mapping[str, Any],
    public_texts: Callable[[], Iterable[str]],
) -> Text:
    """Returns the preparation that a contract holds: options, then `given`, then `otherwise`.

    Byte pairs without joins get theirs from public texts, `merges` of them; a pretrained tokenizer
    gets the hash of its file.

    Args:
        options: `tokens`, `length`, `source` and `merges`, a number here.
        given: of the user's own schema.
        name: of the data set.
        otherwise: what holds where neither says anything.
        public_texts: opened only where joins are to be learned.

    Raises:
        UnknownName: for another option or another kind of tokens.
        UsageError: where a value will not do, or the tokenizer is not on this machine.
    """
    said = {} if given is None else given.model_dump(exclude_unset=True)
    wanted = {**otherwise, **said, **options}
    count = _checked(options, wanted, name)
    if wanted["tokens"] != "pretrained" and "source" not in {**said, **options}:
        wanted["source"] = None  # what else holds may name one, for other tokens
    merges = said.get("merges", ())
    if wanted["tokens"] == "byte-pairs" and not merges:
        merges = tokens.learn_merges(public_texts(), count)
    text = parse(Text, {**wanted, "merges": merges}, source=f"data set {name!r}")
    return pretrained.held(text) if text.tokens == "pretrained" else text


def _checked(options: Mapping[str, Scalar], wanted: Mapping[str, Any], name: str) -> int:
    """Returns how many merges to learn, where options and the kind of tokens are known ones."""
    for option in options:
        if option not in OPTIONS:
            raise UnknownName(f"option of the data set {name!r},", option, OPTIONS)
    kinds = get_args(Text.model_fields["tokens"].annotation)
    if wanted["tokens"] not in kinds:
        raise UnknownName(f"kind of tokens of the data set {name!r},", str(wanted["tokens"]), kinds)
    count = options.get("merges", _MERGES)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 50_000:
        raise UsageError(f"data.options.merges {count!r} must be a number from 1 to 50,000")
    return count


def terms_of(name: str, text: Text) -> DataTerms:
    """Returns the terms of a data set of labelled text; raises as `vocabulary` does."""
    return DataTerms(
        name=name,
        shape=(text.length,),
        classes=len(text.labels),
        vocabulary=tokens.vocabulary(text),
        preparation=text,
    )


def of(terms: DataTerms) -> Text:
    """Returns the preparation of terms that fit.

    Raises:
        UsageError: where they hold none of text.
    """
    if not isinstance(terms.preparation, Text):
        raise UsageError(f"data set {terms.name!r} needs a preparation of text, and has none")
    return terms.preparation
