"""Rows of every kind of data go in by the contract's terms and come back with answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bract.shared import exports, models, prediction, trained
from bract.shared.data import Examples
from bract.shared.data import table as user_table
from bract.shared.data import text as user_text
from bract.shared.encoding import encode
from bract.shared.errors import UsageError
from bract.shared.evaluation import Evaluator
from bract.shared.preparation import Categorical, Images, Numeric, Table, Target, Text
from bract.shared.terms import DataTerms, ModelTerms
from bract.shared.trained import Trained


class Successors(nn.Module):
    """Scores of each place's successor, or of classes by the first token, from a table."""

    def __init__(self, vocabulary: int, classes: int, task: str) -> None:
        super().__init__()
        self.table, self.task = nn.Embedding(vocabulary, classes), task

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.table(tokens)
        return scores if self.task == "next-token" else scores[:, 0]


def successors(
    shape: tuple[int, ...], classes: int, *, vocabulary: int, task: str = "classes"
) -> nn.Module:
    return Successors(vocabulary, classes, task)


@pytest.fixture
def made(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns what makes a trained model of data terms, with random weights."""
    monkeypatch.setitem(models.MODELS, "successors", successors)

    def make(data: DataTerms) -> Trained:
        name = "linear" if data.vocabulary is None else "successors"
        agreed = world.contract(model=ModelTerms(name=name), data=data, evaluation=None)
        model = models.of(agreed.model, agreed.data).eval()
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
        return Trained(tmp_path, agreed, weights, model, sha256="0" * 64)

    return make


def table(target: Target) -> DataTerms:
    columns = (Numeric(name="age", low=0, high=100), Categorical(name="ward", categories=("a",)))
    prepared = Table(columns=columns, target=target)
    classes = 1 if target.classes is None else len(target.classes)
    return DataTerms(
        name="mine",
        shape=(prepared.width,),
        classes=classes,
        task="value" if classes == 1 else "classes",
        preparation=prepared,
    )


ILL = table(Target(name="ill", classes=("no", "yes")))
DOSE = table(Target(name="dose", low=100, high=300))
TOKENS = DataTerms(name="mine", shape=(4,), classes=6, vocabulary=6, task="next-token")
TOPIC = DataTerms(
    name="mine",
    shape=(3,),
    classes=2,
    vocabulary=257,
    preparation=Text(length=3, labels=("dull", "fair")),
)
SCANS = DataTerms(
    name="mine",
    shape=(1, 2, 2),
    classes=2,
    preparation=Images(labels=("cat", "dog"), height=2, width=2, colour=False),
)


def predicted(of: Trained, path: Path, output: str = "answers") -> Path:
    written = path.parent / output
    prediction.predict(of, (path,), written)
    return written


def test_values_come_back_in_the_unit_of_the_file(made: Any, tmp_path: Path) -> None:
    of, inputs = made(DOSE), np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", inputs=inputs)
    with np.load(predicted(of, tmp_path / "rows.npz")) as found:
        assert set(found) == {"inputs", "prediction"}
        values = found["prediction"]
    learned = inputs @ of.weights["1.weight"].T + of.weights["1.bias"]
    assert values == pytest.approx(100 + (learned[:, 0] + 1) * 100, rel=1e-5)
    # as the evaluation measures it
    targets = np.zeros(6, dtype=np.float32)
    shown = Evaluator(of.model, DOSE).report(of.weights, Examples(inputs, targets))  # type: ignore[arg-type]
    error = float(np.abs(values - 200).mean())
    assert shown["test_mean_absolute_error"] == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("form", exports.FORMATS)
@pytest.mark.parametrize("data", [DOSE, TOKENS, TOPIC], ids=["value", "next-token", "text"])
def test_models_of_every_task_can_be_exported(made: Any, data: DataTerms, form: str) -> None:
    assert exports.export(made(data), form).greatest_difference <= 1e-4


def test_a_next_token_is_the_one_after_the_last_place(made: Any, tmp_path: Path) -> None:
    of, tokens = made(TOKENS), np.array([[0, 1, 2, 3], [5, 5, 5, 0]])
    np.savez(tmp_path / "rows.npz", inputs=tokens)
    with np.load(predicted(of, tmp_path / "rows.npz")) as found:
        assert set(found) == {"inputs", "prediction", "probability"}
        assert found["prediction"].tolist() == of.weights["table.weight"][[3, 0]].argmax(1).tolist()


@pytest.mark.parametrize("row", ["0,1,2,6", "0,-1,2,3"])
def test_a_token_that_does_not_exist_is_an_error(made: Any, tmp_path: Path, row: str) -> None:
    (tmp_path / "rows.csv").write_text(f"a,b,c,d\n0,1,2,3\n{row}\n")
    with pytest.raises(UsageError, match="row 2: a token is not from 0 below 6"):
        predicted(made(TOKENS), tmp_path / "rows.csv")


def test_tokens_are_whole_numbers(made: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", inputs=np.zeros((1, 4)))
    with pytest.raises(UsageError, match="must be whole numbers"):
        predicted(made(TOKENS), tmp_path / "rows.npz")


@pytest.mark.parametrize("left", [0, 60])
def test_an_archive_that_was_cut_off_is_an_error(made: Any, tmp_path: Path, left: int) -> None:
    path = tmp_path / "rows.npz"
    np.savez(path, inputs=np.zeros((1, 4), np.int64))
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UsageError, match=r"rows.npz: it must be .npz of plain arrays"):
        predicted(made(TOKENS), path)


def test_a_table_goes_back_with_its_columns_and_answers(made: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("\ufeffid,ward,age\nx1,a,40\n\nx2,b,90\n")
    with predicted(made(ILL), tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["age"]) for row in rows] == [("x1", "40"), ("x2", "90")]
    for row in rows:
        odds = {label: float(row[f"probability_{label}"]) for label in ("no", "yes")}
        assert sum(odds.values()) == pytest.approx(1)
        assert row["prediction"] == max(odds, key=lambda label: odds[label])
        assert float(row["probability"]) == max(odds.values())
    (tmp_path / "other.csv").write_text("id,age\nx1,40\n")
    with pytest.raises(UsageError, match="column 'ward' is missing"):
        predicted(made(ILL), tmp_path / "other.csv", "other")


def test_json_lines_go_back_with_their_keys_and_answers(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"text": "good", "id": 7}, {"text": "bad, café"}]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "rows.jsonl").write_text(text)
    written = predicted(made(TOPIC), tmp_path / "rows.jsonl").read_text().splitlines()
    for line, answer in zip(lines, map(json.loads, written), strict=True):
        assert {name: answer[name] for name in line} == line
        odds = answer["probabilities"]
        assert set(odds) == {"dull", "fair"}
        assert odds[answer["prediction"]] == answer["probability"] == max(odds.values())
    for broken, fault in [("{", "row 1: not JSON"), ('{"text": 3}', "row 1: no object with")]:
        (tmp_path / "broken.jsonl").write_text(broken)
        with pytest.raises(UsageError, match=fault):
            predicted(made(TOPIC), tmp_path / "broken.jsonl", "other")


ENDS_OF_LINES = "a\u2028b\u2029c\x85d"  # to str.splitlines(), and not to JSON nor to CSV


def test_json_lines_that_train_are_predicted_whatever_else_ends_a_line(
    made: Any, tmp_path: Path
) -> None:
    row = json.dumps({"text": ENDS_OF_LINES, "label": "fair"}, ensure_ascii=False)
    (tmp_path / "train.jsonl").write_text(f"\ufeff{row}\n\n{row}\n", encoding="utf-8")
    of = made(TOPIC)
    trained_on = user_text.load_part(of.contract.data, tmp_path, "1/1")
    assert trained_on.targets.tolist() == [1, 1]
    rows = encode(of.contract.data, [tmp_path / "train.jsonl"])
    assert rows.inputs.tolist() == trained_on.inputs.tolist()
    written = predicted(of, tmp_path / "train.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["text"] for line in written[:-1]] == [ENDS_OF_LINES] * 2


def test_a_table_that_trains_is_predicted_whatever_else_ends_a_line(
    made: Any, tmp_path: Path
) -> None:
    content = f"age,ward,ill,note\n40,a,no,{ENDS_OF_LINES}\r\n50,b,yes,\n"
    (tmp_path / "rows.csv").write_text(content, encoding="utf-8", newline="")
    trained_on = user_table.read(ILL, tmp_path / "rows.csv")
    assert trained_on.targets.tolist() == [0, 1]
    rows = encode(ILL, [tmp_path / "rows.csv"])
    assert rows.inputs.tolist() == trained_on.inputs.tolist()
    with predicted(made(ILL), tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        assert [row["note"] for row in csv.DictReader(file)] == [ENDS_OF_LINES, ""]


def test_half_of_a_surrogate_pair_goes_back_as_it_came(made: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a\\ud800é"}\n', encoding="utf-8")
    written = predicted(made(TOPIC), tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert written.startswith('{"text": "a\\ud800é", "prediction": ')


def test_json_lines_that_are_not_utf8_are_named(made: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(UsageError, match="row 2: not UTF-8"):
        predicted(made(TOPIC), tmp_path / "rows.jsonl")


def test_a_folder_of_images_becomes_a_csv_of_labels(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "scans"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deep/c.jpeg", "notes.txt"):
        if name.endswith(".txt"):
            (folder / name).write_text("no image")
        else:
            Image.new("L", (9, 7), 99).save(folder / name)
    single = tmp_path / "one.png"
    Image.new("L", (2, 2)).save(single)
    of, output = made(SCANS), tmp_path / "labels.csv"
    assert prediction.predict(of, (single, folder), output) == 4
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    files = [single, folder / "a.JPG", folder / "b.png", folder / "deep/c.jpeg"]
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert all(row["label"] in ("cat", "dog") and float(row["probability"]) >= 0.5 for row in rows)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UsageError, match="no image in"):
        prediction.predict(of, (tmp_path / "bare",), tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("data", "name", "takes"),
    [(ILL, "rows.jsonl", ".csv or .npz"), (TOPIC, "rows.csv", ".jsonl or .npz")],
)
def test_another_kind_of_file_than_the_contract_names_is_bad_usage(
    made: Any, tmp_path: Path, data: DataTerms, name: str, takes: str
) -> None:
    (tmp_path / name).write_text("a\n1\n")
    with pytest.raises(UsageError, match=f"takes {takes}"):
        predicted(made(data), tmp_path / name)


def test_labels_are_those_that_the_contract_names() -> None:
    assert trained.labels_of(ILL) == ("no", "yes")
    assert trained.labels_of(TOPIC) == ("dull", "fair")
    assert trained.labels_of(DataTerms(name="mine", shape=(2,), classes=3)) == ("0", "1", "2")
