"""Models that server and site build alike from a contract's terms."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from bract.shared import factories
from bract.shared.errors import BractError, UnknownName, UsageError, VerificationFailed
from bract.shared.models import frozen
from bract.shared.models.cnn import cnn
from bract.shared.models.linear import linear
from bract.shared.models.lstm import lstm
from bract.shared.models.mlp import mlp
from bract.shared.models.pretrained import hf
from bract.shared.models.resnet import resnet
from bract.shared.models.transformer import transformer
from bract.shared.terms import DataTerms, ModelTerms, Scalar, Task

Shape = tuple[int, ...]
Factory = Callable[..., nn.Module]

_FROM_DATA: Final = {"vocabulary", "task"}

MODELS: dict[str, Factory] = {
    "linear": linear,
    "mlp": mlp,
    "cnn": cnn,
    "resnet": resnet,
    "lstm": lstm,
    "transformer": transformer,
    "hf": hf,
}


def of(model: ModelTerms, data: DataTerms) -> nn.Module:
    """Returns the model that a contract describes, new; raises as `build` does.

    Raises:
        VerificationFailed: where the contract names other frozen weights than there are here.
    """
    made = build(
        model.name,
        data.shape,
        data.classes,
        model.options,
        vocabulary=data.vocabulary,
        task=data.task,
    )
    if model.frozen is not None and frozen.digest(made) != model.frozen:
        raise VerificationFailed(
            f"model {model.name!r}: the frozen weights here are not those that the contract names: "
            "get the same ones, by their SHA-256, or have the contract made anew"
        )
    return made


def pinned(model: ModelTerms, data: DataTerms) -> ModelTerms:
    """Returns the terms with the SHA-256 of the weights that are never sent, where there are any.

    Raises:
        VerificationFailed: where the terms name others.
        UsageError: where the model is frozen as chance would have it.
    """
    found = frozen.digest(of(model, data))
    if found is not None and frozen.digest(of(model, data)) != found:
        raise UsageError(
            f"model {model.name!r}: its frozen weights are others each time it is built, and no "
            "site could have the same: make them from a seed of their own, or a file"
        )
    return model.model_copy(update={"frozen": found})


def build(
    name: str,
    shape: Shape,
    classes: int,
    options: dict[str, Scalar],
    *,
    vocabulary: int | None = None,
    task: Task = "classes",
) -> nn.Module:
    """Returns a new model for inputs of `shape` (without the batch axis) and `classes` outputs.

    `name` is a registered model, or `module:factory` of installed code; a site takes the latter
    only where its policy lists it. A factory for tokens takes `vocabulary` by keyword, one that
    predicts the token after each place `task` too; what takes neither is for numbers.

    Raises:
        UnknownName: for an unknown model or option, naming the nearest.
        UsageError: where the module, the factory or an option's value will not do.

    Example:
        >>> sum(p.numel() for p in build("linear", (1, 8, 8), 10, {}).parameters())
        650
    """
    make = factory(name)
    signature = inspect.signature(make)
    given = _of_data(name, signature, vocabulary, task)
    known = [option for option in list(signature.parameters)[2:] if option not in _FROM_DATA]
    for option, value in options.items():
        if option not in known:
            raise UnknownName(f"option of the model {name!r},", option, known or ["(none)"])
        _check_type(name, option, value, signature.parameters[option].default)
    try:
        model = make(shape, classes, **given, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"model {name!r}: {error}") from error
    except BractError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"model {name!r}: its factory fails with {reason}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {name!r}: the factory returned no torch module")
    for layer in model.modules():
        if getattr(layer, "inplace", False) is True:
            vars(layer)["inplace"] = False  # the same numbers, from a layer whose input stays
    return model


def _of_data(
    name: str, signature: inspect.Signature, vocabulary: int | None, task: Task
) -> dict[str, Any]:
    """Returns what a factory takes of the data beside shape and classes.

    Raises:
        UsageError: where the model is for other data.
    """
    takes = _FROM_DATA & signature.parameters.keys()
    needs_tokens = (
        "vocabulary" in takes
        and signature.parameters["vocabulary"].default is inspect.Parameter.empty
    )
    if vocabulary is not None and "vocabulary" not in takes:
        raise UsageError(f"model {name!r} takes numbers, and these data are tokens: choose another")
    if vocabulary is None and needs_tokens:
        raise UsageError(f"model {name!r} takes tokens, and these data are numbers: choose another")
    if task == "next-token" and "task" not in takes:
        raise UsageError(f"model {name!r} gives one answer an input, not one a token")
    return {
        key: value for key, value in (("vocabulary", vocabulary), ("task", task)) if key in takes
    }


def released_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that may leave a site, by name: the trainable ones, no buffers."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def released_shapes(model: nn.Module) -> dict[str, Shape]:
    """Returns the names and shapes that weights and updates must have exactly."""
    return {name: tuple(value.shape) for name, value in released_parameters(model).items()}


def _check_type(name: str, option: str, value: Scalar, default: object) -> None:
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if number and (
        isinstance(value, bool | str) or (isinstance(default, int) and value != int(value))
    ):
        kind = "a whole number" if isinstance(default, int) else "a number"
    elif isinstance(default, bool | str) and type(value) is not type(default):
        kind = "true or false" if isinstance(default, bool) else "text"
    else:
        return
    raise UsageError(f"model {name!r}: option {option} must be {kind} (got {value!r})")


def factory(name: str) -> Factory:
    """Returns what builds a model: a registered one, or installed code by `module:factory`.

    Raises:
        UnknownName: for an unknown model, naming the nearest.
        UsageError: where the module or the factory will not do.
    """
    if name in MODELS:
        return MODELS[name]
    if ":" not in name:
        raise UnknownName("model", name, MODELS)
    return factories.named(name, "model")
