"""`bract model` on a real run: it scores, answers and exports what was trained."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from bract.shared import arrays, canonical, keys, trained
from bract.shared.data import describe, load
from bract.shared.preparation import Numeric, Table, Target
from bract.shared.privacy import accounting, entries, receipts
from bract.shared.privacy.receipts import Received
from bract.shared.reports.runs import Scores, ServerSummary, facts_of
from bract.shared.terms import DataTerms
from bract.simulations import experiment, simulation
from bract.simulations.engines import LocalEngine

Bract = Callable[..., Any]
FORMATS = ("safetensors", "torch", "onnx")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of three sites on digits; its tests copy what they change."""
    out = tmp_path_factory.mktemp("trained") / "run"
    chosen = experiment.load(
        "digits", model="linear", overrides={"rounds": 2, "sites": 3}, settings=[]
    )
    begun = simulation.begin(chosen, out=out, state=None, data_dir=None, workers=1)
    begun.complete(LocalEngine())
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run folder that may be spoilt."""
    target = tmp_path / "copy"
    target.mkdir()
    for name in ("contract.json", "summary.json", "model.safetensors"):
        shutil.copy(run / name, target / name)
    return target


def report(name: str, done: Any) -> Any:
    """Returns what a command printed, held against its schema."""
    assert done.returncode == 0, done.stderr
    text = (resources.files("bract.shared.schemas") / f"model-{name}.schema.json").read_text()
    found = json.loads(done.stdout)
    jsonschema.validate(found, json.loads(text))
    return found


def summary(run: Path) -> Any:
    return json.loads((run / "summary.json").read_text())


def held_out() -> Any:
    """The public test digits as they are read, and what they are."""
    return load(describe("digits"), None).test


def test_evaluate_gives_the_figures_of_the_summary(bract: Bract, run: Path) -> None:
    found = report("evaluate", bract("model", "evaluate", str(run), "--json"))
    said = summary(run)
    figures = [name for name in found if name in said]
    assert {"test_accuracy", "test_loss", "precision", "recall", "f1", "auc"} <= set(figures)
    assert {name: found[name] for name in figures} == {name: said[name] for name in figures}
    assert found["examples"] == 360
    assert found["agrees"] is True
    assert said["model_sha256"] == canonical.sha256((run / "model.safetensors").read_bytes())


def test_evaluate_reports_and_fails_where_the_weights_are_not_the_summarys(
    bract: Bract, copy: Path
) -> None:
    _other_weights(copy)
    done = bract("model", "evaluate", "copy", "--json")
    assert done.returncode == 1
    assert "copy/summary.json is of other weights than model.safetensors" in done.stderr
    found = json.loads(done.stdout)
    assert found["agrees"] is False
    assert found["test_accuracy"] < summary(copy)["test_accuracy"]


def test_a_summary_that_names_no_weights_is_held_to_its_figures(bract: Bract, copy: Path) -> None:
    """As an earlier version wrote it."""
    said = summary(copy)
    del said["model_sha256"]
    (copy / "summary.json").write_text(json.dumps(said))
    assert report("evaluate", bract("model", "evaluate", "copy", "--json"))["agrees"] is True
    _other_weights(copy)
    done = bract("model", "evaluate", "copy")
    assert done.returncode == 1
    assert "360 public test examples: test accuracy" in done.stdout
    assert "copy/summary.json says otherwise of this model (auc, f1, precision, " in done.stderr


def test_evaluate_says_where_no_summary_lies_beside_the_model(bract: Bract, copy: Path) -> None:
    (copy / "summary.json").unlink()
    assert report("evaluate", bract("model", "evaluate", "copy", "--json"))["agrees"] is None
    assert "no summary.json lies beside it" in bract("model", "evaluate", "copy").stdout


def test_figures_within_rounding_are_as_said_and_what_is_not_said_is_passed_over() -> None:
    said = {"test_accuracy": 0.5, "test_loss": 2.0, "test_accuracy_by_group": {"north": 0.5}}
    found = Scores(**said, f1=0.4, confusion=[[1]])
    assert found.departures(Scores(**said)) == []
    near = {"test_accuracy": 0.505, "test_loss": 2.01, "test_accuracy_by_group": {"north": 0.6}}
    assert found.departures(Scores(**near)) == []
    for name, value in (
        ("test_accuracy", 0.52),
        ("test_loss", 1.9),
        ("f1", 0.5),
        ("auc", 0.9),
    ):
        assert found.departures(Scores(**{**said, name: value})) == [name]


def test_evaluate_tells_of_other_examples_than_the_contract_declares(
    bract: Bract, world: Any, tmp_path: Path
) -> None:
    data = describe("digits").model_copy(update={"public": "0" * 64})
    signed = world.sign(world.contract(data=data))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/contract.json").write_bytes(signed.to_bytes())
    arrays.save(world.order(signed).weights, tmp_path / "run/model.safetensors")
    done = bract("model", "evaluate", "run")
    assert done.returncode == 1
    assert "not those that the contract declares" in done.stderr


# Export


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_answers_as_the_model_does(
    bract: Bract, run: Path, tmp_path: Path, form: str
) -> None:
    done = bract("model", "export", str(run), "--format", form, "-o", "model.out", "--json")
    found = report("export", done)
    assert found["greatest_difference"] <= 1e-4
    assert found["guarantee"] == "none: simulation"
    assert found["bytes"] == (tmp_path / "model.out").stat().st_size
    test = held_out()
    answers = _answers(tmp_path / "model.out", form, test.inputs.astype(np.float32))
    raw = trained.read(run).raw_model()
    with torch.inference_mode():
        wanted = raw(torch.from_numpy(test.inputs)).numpy()
    assert np.abs(answers - wanted).max() <= 1e-4
    assert (answers.argmax(1) == wanted.argmax(1)).all()
    assert (answers.argmax(1) == test.targets).mean() == summary(run)["test_accuracy"]


def _answers(path: Path, form: str, inputs: np.ndarray) -> np.ndarray:
    """Returns what someone without bract computes by the file."""
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes())
        (outputs,) = session.run(None, {"inputs": inputs})
        return np.asarray(outputs)
    if form == "torch":
        with path.open("rb") as file:
            program = torch.export.load(file)  # type: ignore[arg-type]
        return np.asarray(program.module()(torch.from_numpy(inputs)).detach())
    with safe_open(path, "np") as file:
        data = json.loads(file.metadata()["data"])
    held = load_file(path)
    rows = (inputs.reshape(len(inputs), -1) - data["offset"]) / data["scale"]
    return np.asarray(rows @ held["1.weight"].T + held["1.bias"])


def test_a_torch_export_holds_no_pickle(bract: Bract, run: Path, tmp_path: Path) -> None:
    assert bract("model", "export", str(run), "--format", "torch", "-o", "m.pt2").returncode == 0
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    assert not [name for name in sizes if name.endswith(".pkl")]
    assert [size for name, size in sizes.items() if name.endswith(".pt")] == [0]


@pytest.mark.parametrize("form", FORMATS)
def test_the_card_beside_it_claims_nothing_of_a_simulation(
    bract: Bract, run: Path, tmp_path: Path, form: str
) -> None:
    done = bract("model", "export", str(run), "--format", form, "-o", "model.out")
    assert "none: simulation" in done.stdout
    text, said = (tmp_path / "model.out.md").read_text(), summary(run)
    privacy = text.split("## Privacy")[1].split("##")[0].strip()
    assert privacy.startswith("none: simulation;")
    assert "(ε, δ)-DP" not in text
    assert said["contract_sha256"] in text
    assert f"| accuracy | {said['test_accuracy']:.4f} |" in text
    for name, site in said["per_site"].items():
        assert f"| {name} | {site['domain']} | " in text
    assert ("is yours to do first" in text) == (form == "safetensors")
    compile(text.split("```python")[1].split("```")[0], "card", "exec")


def test_the_card_of_a_real_run_states_its_claim_whatever_is_simulated_states_none(
    world: Any, run: Path, tmp_path: Path
) -> None:
    from bract.shared import card

    said = summary(run)
    facts = {name: said[name] for name in ServerSummary.model_fields}
    real = ServerSummary(**{**facts, "guarantee": "(ε, δ)-DP per example", "epsilon_run": 2.5})
    shown = card.card(world.contract(), real, file=tmp_path / "m.onnx", form="onnx")
    privacy = shown.split("## Privacy")[1].split("##")[0].strip()
    assert privacy.startswith("(ε, δ)-DP per example: ε = 2.5000 at δ = 1e-05, add-or-remove-one")
    assert "every attempt of this run" in privacy
    table = Table(
        columns=(Numeric(name="age", low=20, high=80),),
        target=Target(name="ill", classes=("no", "yes")),
        group="patient",
    )
    data = DataTerms(name="table", shape=(1,), classes=2, preparation=table)
    assert "replace-one" not in privacy
    for told, replaced in (({}, "not bounded here"), ({"epsilon_replaced": 4.5}, "4.5000")):
        of_persons = card.claim(world.contract(data=data), real.model_copy(update=told))
        assert of_persons.endswith(
            " ε per example holds where its person has no more than 1 example; of a person with "
            f"more, another example takes its place, and by replace-one ε is {replaced}."
        )
    simulated = trained.read(run).contract
    assert card.claim(simulated, real).startswith("none: simulation;")
    plain = simulated.model_copy(
        update={"privacy": simulated.privacy.model_copy(update={"mechanism": "none"})}
    )
    assert card.claim(plain, real) == "none: unprotected: nothing was clipped or noised."


@pytest.fixture
def real(world: Any, tmp_path: Path) -> Any:
    """A run folder as a server leaves it: three attempts, the second void, by a real gate."""
    desk, folder = keys.generate(), tmp_path / "real"
    agreed = world.contract(witness=desk.public)
    signed, gate = world.sign(agreed), world.gate()
    replies = [world.serve(gate, world.order(signed, number)) for number in (1, 2, 3)]
    gate.ledger.close()
    folder.mkdir()
    (folder / "contract.json").write_bytes(signed.to_bytes())
    lines = receipts.to_lines(
        Received(reply.receipt, reply.signature, reply.ledger, number, number != 2)
        for number, reply in enumerate(replies, start=1)
    )
    (folder / "receipts.jsonl").write_bytes(lines)
    content = arrays.to_bytes(world.order(signed).weights)
    (folder / "model.safetensors").write_bytes(content)
    spent = entries.events_of_attempts(agreed, attempts=3, completed=2)
    told = ServerSummary(
        **facts_of(agreed),
        epsilon_run=accounting.epsilon(spent, 1e-5),
        delta=1e-5,
        refused=[],
        heads={},
        rounds=2,
        seconds=1.0,
        guarantee="(ε, δ)-DP per example",
        out="run",
        test_accuracy=0.5,
        test_loss=1.0,
        model_sha256=canonical.sha256(content),
    )
    (folder / "summary.json").write_bytes(canonical.encode(told.model_dump(mode="json")))
    return folder


def retell(run: Path, **facts: Any) -> None:
    (run / "summary.json").write_text(json.dumps({**summary(run), **facts}))


def export(bract: Bract, out: str = "m") -> Any:
    return bract("model", "export", "real", "--format", "safetensors", "-o", out, "--json")


def test_the_epsilon_on_a_card_is_what_receipts_show(
    bract: Bract, real: Path, tmp_path: Path
) -> None:
    epsilon = summary(real)["epsilon_run"]
    assert report("export", export(bract))["unproven"] == []
    text = (tmp_path / "m.md").read_text()
    assert f"(ε, δ)-DP per example: ε = {epsilon:.4f} at δ = 1e-05" in text
    assert "own word" not in text
    retell(real, epsilon_run=epsilon + 0.1)  # an attempt that nobody answered
    assert export(bract, "more").returncode == 0
    # Two attempts of three.
    retell(real, epsilon_run=0.9 * epsilon)
    done = export(bract, "less")
    assert done.returncode == 1
    assert "says ε" in done.stderr
    assert f"the receipts beside it show {epsilon:.4f}" in done.stderr
    assert not (tmp_path / "less").exists()


def test_what_no_receipt_and_no_weights_prove_is_said_to_be_the_runs_own_word(
    bract: Bract, real: Path, tmp_path: Path
) -> None:
    (real / "receipts.jsonl").unlink()
    retell(real, model_sha256=None)
    said = report("export", export(bract))["unproven"]
    assert [line.split(" by ")[0] for line in said] == ["The scores are", "ε is"]
    privacy = (tmp_path / "m.md").read_text().split("## Privacy")[1].split("##")[0]
    assert all(line in privacy for line in said)


@pytest.mark.parametrize(
    ("altered", "fault"),
    [
        (lambda line: line["receipt"].update(attempt=2), "receipts.jsonl: "),
        (lambda line: line["links"].pop(), "receipts.jsonl: the links do not lead to the head"),
        (lambda line: line["receipt"].update(site="beta"), "lists no site 'beta'"),
    ],
    ids=["receipt", "links", "site"],
)
def test_receipts_that_do_not_hold_prove_no_epsilon(
    bract: Bract, real: Path, tmp_path: Path, altered: Callable[[Any], Any], fault: str
) -> None:
    path = real / "receipts.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    altered(lines[1])
    path.write_bytes(b"".join(canonical.encode(line) + b"\n" for line in lines))
    done = export(bract)
    assert done.returncode == 1
    assert fault in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_a_missing_extra_is_named(
    bract: Bract, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = bract("model", "export", str(run), "--format", "onnx", "-o", "m.onnx")
    assert done.returncode == 2
    assert "pip install 'bract[export]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_answers_otherwise_is_not_written(
    bract: Bract, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bract.shared import exports

    monkeypatch.setattr(exports, "TOLERANCE", -1.0)
    done = bract("model", "export", str(run), "--format", "torch", "-o", "m.pt2")
    assert done.returncode == 1
    assert "answers otherwise" in done.stderr
    assert list(tmp_path.iterdir()) == []


# Predict


def test_npz_goes_back_with_answers_that_a_csv_gets_too(
    bract: Bract, run: Path, tmp_path: Path
) -> None:
    test = held_out()
    np.savez(tmp_path / "rows.npz", inputs=test.inputs, truth=test.targets)
    done = bract("model", "predict", str(run), "rows.npz", "-o", "answers.npz", "--json")
    assert report("predict", done)["rows"] == 360
    with np.load(tmp_path / "answers.npz") as found:
        assert set(found) == {"inputs", "truth", "prediction", "probability", "probabilities"}
        right = (found["prediction"].astype(int) == found["truth"]).mean()
        probabilities, likely = found["probabilities"], found["probability"]
    assert right == summary(run)["test_accuracy"]
    assert probabilities.sum(1) == pytest.approx(np.ones(360))
    assert likely == pytest.approx(probabilities.max(1))

    header = [f"pixel {place}" for place in range(64)]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *test.inputs[:20].reshape(20, 64).tolist()])
    done = bract("model", "predict", str(run), "rows.csv", "-o", "answers.csv")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["prediction", "probability", *(f"probability_{label}" for label in range(10))]
    assert list(rows[0]) == [*header, *names]
    assert [float(row["pixel 20"]) for row in rows] == test.inputs[:20].reshape(20, 64)[
        :, 20
    ].tolist()
    for row, values in zip(rows, probabilities, strict=False):
        assert [float(row[name]) for name in names[2:]] == pytest.approx(values.tolist(), abs=1e-6)
        assert row["prediction"] == str(values.argmax())


GRID = ",".join(f"c{place}" for place in range(64))
FILES = {
    "few.csv": ("a,b\n1,2\n", "2 columns, and the model takes 64"),
    "word.csv": (f"{GRID}\n{'1,' * 63}secret\n", "row 2, column c63: not a number"),
    "nan.csv": (f"{GRID}\n{'1,' * 63}nan\n", "row 1: a number is not finite"),
    "short.csv": (f"{GRID}\n{'1,' * 62}1\n", "row 2: 63 cells under 64 names"),
    "none.csv": (f"{GRID}\n", "holds no rows"),
    "empty.csv": ("", "is empty: its first line must name the columns"),
    "taken.csv": (f"prediction{GRID[2:]}\n{'1,' * 63}1\n", "has 'prediction' already: rename it"),
    "rows.jsonl": ('{"text": "secret"}\n', "takes .csv or .npz"),
    "rows.npz": ("secret", "must be .npz of plain arrays"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_read_is_named_and_never_shown(
    bract: Bract, run: Path, tmp_path: Path, name: str
) -> None:
    content, fault = FILES[name]
    (tmp_path / name).write_text(content)
    done = bract("model", "predict", str(run), name, "-o", "answers")
    assert done.returncode == 2
    assert fault in done.stderr
    assert "secret" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "answers").exists()


@pytest.mark.parametrize(
    ("held", "fault"),
    [
        ({"x": np.zeros((2, 1, 8, 8))}, "has no array 'inputs': it has x"),
        ({"inputs": np.zeros((2, 8, 8))}, "inputs of shape [8, 8] a row, and the model takes"),
        ({"inputs": np.full((2, 1, 8, 8), "a")}, "inputs must be numbers"),
        ({"inputs": np.full((2, 1, 8, 8), None)}, "must be .npz of plain arrays"),
        ({"inputs": np.zeros((0, 1, 8, 8))}, "holds no rows"),
    ],
    ids=["no inputs", "shape", "words", "objects", "no rows"],
)
def test_npz_of_anything_else_is_bad_usage(
    bract: Bract, run: Path, tmp_path: Path, held: Any, fault: str
) -> None:
    np.savez(tmp_path / "rows.npz", **held)
    done = bract("model", "predict", str(run), "rows.npz", "-o", "answers.npz")
    assert done.returncode == 2
    assert fault in done.stderr


# Bad input


def test_nothing_is_overwritten(bract: Bract, run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    (tmp_path / "other.md").write_text("mine")
    for words in (
        ("predict", str(run), "there", "-o", "there"),
        ("export", str(run), "--format", "safetensors", "-o", "there"),
        ("export", str(run), "--format", "safetensors", "-o", "other"),
    ):
        done = bract("model", *words)
        assert done.returncode == 2
        assert "nothing is overwritten" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.md", "there"]


def _no_model(copy: Path) -> None:
    (copy / "model.safetensors").unlink()


def _damaged(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"nothing")


def _other_shape(copy: Path) -> None:
    held = load_file(copy / "model.safetensors")
    save_file({**held, "1.bias": np.zeros(9, np.float32)}, copy / "model.safetensors")


def _one_more(copy: Path) -> None:
    held = load_file(copy / "model.safetensors")
    save_file({**held, "2.bias": np.zeros(9, np.float32)}, copy / "model.safetensors")


def _not_finite(copy: Path) -> None:
    held = load_file(copy / "model.safetensors")
    save_file({**held, "1.bias": np.full(10, np.inf, np.float32)}, copy / "model.safetensors")


def _other_weights(copy: Path) -> None:
    held = load_file(copy / "model.safetensors")
    save_file({name: 0 * value for name, value in held.items()}, copy / "model.safetensors")


def _other_contract(copy: Path) -> None:
    path = copy / "contract.json"
    path.write_bytes(path.read_bytes().replace(b'"rounds":2', b'"rounds":1'))


def _other_summary(copy: Path) -> None:
    said = summary(copy)
    (copy / "summary.json").write_text(json.dumps({**said, "contract_sha256": "0" * 64}))


def _no_summary(copy: Path) -> None:
    (copy / "summary.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "code", "fault"),
    [
        (_no_model, 2, "cannot read the model copy/model.safetensors"),
        (_damaged, 1, "copy/model.safetensors is damaged"),
        (_other_shape, 1, "does not fit contract.json beside it: array '1.bias' has shape (9,)"),
        (_one_more, 1, "does not fit contract.json beside it: array '2.bias' is extra"),
        (_not_finite, 1, "array '1.bias' holds a value that is not finite"),
        (_other_contract, 1, "signature"),
        (_other_summary, 1, "is of another contract than contract.json"),
        (_other_weights, 1, "copy/summary.json is of other weights than model.safetensors"),
        (_no_summary, 2, "cannot read copy/summary.json"),
        (shutil.rmtree, 2, "no run folder copy"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_whose_files_do_not_belong_together_is_refused(
    bract: Bract, copy: Path, tmp_path: Path, spoil: Callable[[Path], None], code: int, fault: str
) -> None:
    spoil(copy)
    done = bract("model", "export", "copy", "--format", "safetensors", "-o", "out")
    assert done.returncode == code
    assert fault in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("export", "RUN", "--format", "torchscript", "-o", "out"), "'torchscript' is not one of"),
        (("export", "RUN", "--format", "onnx", "-o", "none/out"), "no folder none"),
        (("evaluate", "RUN", "--public-data", "nowhere"), "no public examples at nowhere"),
        (("predict", "RUN", "nowhere.csv", "-o", "out"), "no input nowhere.csv"),
        (("predict", "RUN", "a", "b", "-o", "out"), "no input a"),
    ],
    ids=["format", "folder", "public", "input", "inputs"],
)
def test_bad_usage_is_one_line(bract: Bract, run: Path, words: tuple[str, ...], fault: str) -> None:
    done = bract("model", *(str(run) if word == "RUN" else word for word in words))
    assert done.returncode == 2
    assert fault in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_command_offers_every_format() -> None:
    from bract.shared.commands import model
    from bract.shared.exports import FORMATS as known

    (option,) = [one for one in model.export.params if one.name == "form"]
    assert tuple(option.type.choices) == known  # type: ignore[attr-defined]
