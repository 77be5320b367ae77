"""A pretrained encoder of text, frozen, with low-rank adapters and a head that are trained.

The weights come from a package, a folder or the hub, from safetensors only; that they are the ones
that the contract means is checked by their SHA-256 (`frozen`).
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bract.shared.data.pretrained import PACKAGED, folder_of
from bract.shared.errors import UnknownName, UsageError
from bract.shared.models import pooling as places
from bract.shared.models.frozen import FrozenFront

POOLINGS = ("mean", "first")
_PADDED_TO = 128


@dataclass(frozen=True, slots=True)
class Kind:
    """What differs between encoders.

    Args:
        counts_from_padding: whether places are numbered from the padding's id on.
        knows_types: whether tokens have types.
        adapted: the layers that get adapters, those of queries and of values.
    """

    counts_from_padding: bool
    knows_types: bool
    adapted: tuple[str, str]


KINDS = {
    "bert": Kind(False, True, ("query", "value")),
    "roberta": Kind(True, True, ("query", "value")),
    "distilbert": Kind(False, False, ("q_lin", "v_lin")),
}


def hf(
    shape: tuple[int, ...],
    classes: int,
    *,
    vocabulary: int,
    encoder: str = PACKAGED,
    rank: int = 0,
    alpha: float = 0.0,
    adapted: int = 0,
    hidden: int = 0,
    pooling: str = "mean",
    states: int = 1,
    normalised: bool = True,
) -> nn.Module:
    """Returns a frozen encoder of Hugging Face's with what is trained: adapters and a head.

    Args:
        shape: the number of tokens.
        classes: how many outputs.
        vocabulary: the encoder's.
        encoder: a folder, the packaged "all-MiniLM-L6-v2", or a name in Hugging Face's cache.
        rank: of the adapters in each attention (LoRA, Hu et al. 2021, arXiv 2106.09685); 0 for a
            head alone, whose features are then computed once (`frozen.FrozenFront`).
        alpha: the adapters' scale is alpha / rank; 0 for 2·`rank`.
        adapted: how many of the last layers get adapters, 0 for all.
        hidden: the units of the head's hidden layer, 0 for a linear head.
        pooling: "mean" over the tokens that are there, or "first".
        states: how many of the last layers' pooled states stand side by side.
        normalised: whether the features of each state are scaled to the norm √width.

    Raises:
        UsageError: where the extra is not installed, or the encoder is not to be had.
        ValueError: where the data are not of this encoder.
    """
    if pooling not in POOLINGS:
        raise UnknownName("pooling", pooling, POOLINGS)
    if min(rank, adapted, hidden) < 0 or alpha < 0:
        raise ValueError("rank, alpha, adapted and hidden must be at least 0")
    body, config = _loaded(folder_of(encoder))
    if not 1 <= states <= config.num_hidden_layers:
        raise ValueError(f"states {states} must be from 1 to {config.num_hidden_layers}")
    _check_fits(config, shape=shape, vocabulary=vocabulary, encoder=encoder)
    if rank:
        _adapt_(body, config, rank=rank, alpha=alpha or 2.0 * rank, adapted=adapted)
    front = Encoder(
        body, config, first=pooling == "first", states=states, normalised=normalised
    ).train()
    back = _head(states * config.hidden_size, hidden, classes)
    if rank:
        return nn.Sequential(front, back)
    return FrozenFront(front, back, ended=config.pad_token_id)


class Encoder(nn.Module):
    """Tokens to one row of features a text; padding is neither attended to nor pooled."""

    def __init__(
        self, body: nn.Module, config: Any, *, first: bool, states: int, normalised: bool
    ) -> None:
        super().__init__()
        self.body, self.padding = body, int(config.pad_token_id)
        self.first, self.states, self.normalised = first, states, normalised
        self.kind = KINDS[config.model_type]

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns (examples, states · width)."""
        there = places.present(tokens, self.padding)
        where = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if self.kind.counts_from_padding:
            where = torch.where(tokens != self.padding, where + 1, 0) + self.padding
        # Four axes are taken as they are. Of two, transformers would drop a mask that hides nothing
        # in the whole batch: one example would choose another's kernel.
        given = {"attention_mask": there[:, None, None], "position_ids": where.contiguous()}
        if self.kind.knows_types:
            given["token_type_ids"] = torch.zeros_like(tokens)
        found = self.body(input_ids=tokens, output_hidden_states=True, **given).hidden_states
        return torch.cat([self._pooled(state, there) for state in found[-self.states :]], dim=1)

    def _pooled(self, state: Tensor, there: Tensor) -> Tensor:
        found = state[:, 0] if self.first else places.mean(state, there)
        if not self.normalised:
            return found
        return math.sqrt(found.shape[1]) * nn.functional.normalize(found, dim=1)


def _head(width: int, hidden: int, classes: int) -> nn.Module:
    """Returns the layers behind the features; the last starts at zero, as softmax regression."""
    out = nn.Linear(hidden or width, classes)
    nn.init.zeros_(out.weight)
    nn.init.zeros_(out.bias)
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), out) if hidden else nn.Sequential(out)


def _loaded(folder: Path) -> tuple[nn.Module, Any]:
    """Returns the encoder in a folder and its configuration.

    It comes frozen, without dropout and without buffers.

    Raises:
        UsageError: where its weights are pickled, or not all there.
        UnknownName: for another kind of encoder.
    """
    _check_weights(folder)
    transformers = _library("transformers")
    with _silent(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder} holds no config.json of an encoder") from error
        if config.model_type not in KINDS:
            raise UnknownName("kind of encoder", str(config.model_type), KINDS)
        body, loading = transformers.AutoModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            dtype=torch.float32,
            output_loading_info=True,
        )
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise UsageError(f"the weights in {folder} lack {missing[0]}: fetch the whole encoder")
    _strip_(body)
    return body.requires_grad_(False), config


def _check_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        pickled = next((path.name for path in folder.glob("*.bin")), None)
        found = f"only {pickled}, which is pickled code" if pickled else "no weights"
        raise UsageError(f"{folder} holds {found}: put model.safetensors there")


def _strip_(body: nn.Module) -> None:
    """Removes what is random, not looked at, or no weight to release."""
    if "pooler" in body._modules:
        body._modules["pooler"] = None  # trained for another task, and not looked at
    for layer in body.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        # Numbers of places, which are passed on each call, are no weights to release.
        for name in list(layer._buffers):
            layer.__dict__[name] = layer._buffers.pop(name)


def _adapt_(body: nn.Module, config: Any, *, rank: int, alpha: float, adapted: int) -> None:
    """Adds trainable adapters to the attention of the last layers; they start without effect."""
    peft, count = _library("peft"), int(config.num_hidden_layers)
    if adapted > count:
        raise ValueError(f"adapted {adapted} is over the {count} layers of the encoder")
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(KINDS[config.model_type].adapted),
        layers_to_transform=list(range(count - (adapted or count), count)),
    )
    peft.inject_adapter_in_model(settings, body)


def _check_fits(config: Any, *, shape: tuple[int, ...], vocabulary: int, encoder: str) -> None:
    """Returns where the tokens of the data are the encoder's.

    Raises:
        ValueError: naming both numbers.
    """
    if config.pad_token_id is None:
        raise ValueError(f"encoder {encoder!r} has no token that fills up a text: choose another")
    if not config.vocab_size - _PADDED_TO < vocabulary <= config.vocab_size:
        raise ValueError(
            f"the data have {vocabulary} tokens and encoder {encoder!r} {config.vocab_size}: "
            "prepare the text with its own tokenizer"
        )
    first = config.pad_token_id + 1 if KINDS[config.model_type].counts_from_padding else 0
    longest = config.max_position_embeddings - first
    if len(shape) != 1 or shape[0] > longest:
        raise ValueError(f"shape {shape} must be one axis of up to {longest} tokens")


def _library(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, while they are imported
            return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"model 'hf' needs {error.name or name}: pip install 'bract[text]'"
        ) from error


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Keeps bars and reports of loading off the terminal: what is wrong is said in one line."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
