"""`bract audit report`: what the page says is what the ledgers prove, and nothing else gets in."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bract.shared import canonical, contract, keys
from bract.shared.privacy import accounting, anchors, export, head_file, verification, witness
from bract.shared.report import charts, wording

Bract = Callable[..., Any]
Render = Callable[..., str]
HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>'
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """A page as text, tables and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"} and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags close in the order they open"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """Returns the one row whose first cell begins so."""
        (found,) = (row for row in self.rows if row and row[0].startswith(first))
        return found


def words(page: str) -> str:
    return " ".join(" ".join(Page(page).text).split())


def spoil(path: Path, statement: str, *values: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        assert connection.execute(statement, values).rowcount
    connection.close()


def ledger(run: Path, site: str = "site-1") -> Path:
    return run / "ledgers" / f"{site}.sqlite"


def test_the_numbers_on_the_page_are_the_ledgers(bract: Bract, audited_run: Path) -> None:
    done = bract("audit", "report", str(audited_run), "-o", "report.html")
    assert done.returncode == 0, done.stderr
    page = Page(Path("report.html").read_text())
    files = sorted(map(str, (audited_run / "ledgers").glob("*.sqlite")))
    budget = json.loads(bract("audit", "budget", *files, "--json").stdout)["domains"]
    assert len(budget) == 3
    for domain in budget:
        row = page.row(domain["site"])
        spent, delta, ceiling, by_filter, left = row[1:6]
        assert (spent, float(delta)) == (f"{domain['epsilon']:.4f}", domain["delta"])
        assert by_filter == f"{domain['epsilon_filter']:.4f}"
        assert (float(ceiling), left) == (domain["limit"], f"{domain['left']:.4f}")
        assert row[7] == str(domain["charges"])
        assert domain["domain"] in row[0]
    agreed = contract.read(audited_run / "contract.json").contract
    pinned = {site.name: site.key for site in agreed.cohort}
    (held,) = verification.verify(ledger(audited_run), site_keys=pinned, anchors={})
    for number in (1, 4):
        charge = held.chain.charges[agreed.sha256, number][0]
        epsilon = accounting.epsilon(held.chain.events_until(charge.sequence), 1e-5)
        assert f"{epsilon:.4f}" in next(row for row in page.rows if row[:1] == [str(number)])
    text = words(Path("report.html").read_text())
    worst = max(domain["epsilon"] for domain in budget)
    assert f"at most {wording.factor(worst)} times as likely (ε = {worst:.4f})" in text
    for wanted in (agreed.sha256, agreed.coordinator, agreed.witness, *pinned.values()):
        assert wanted in text
    assert canonical.sha256(ledger(audited_run).read_bytes()) in text
    assert canonical.sha256((audited_run / "model.safetensors").read_bytes()) in text


def test_a_simulation_says_at_its_top_that_it_guarantees_nothing(run: Path, render: Render) -> None:
    text = words(render(run))
    assert text.index("Simulation: no guarantee") < text.index("What is claimed")
    assert "What is claimed Nothing, for this was a simulation" in text


def test_audits_stand_beside_what_they_are_of(audited_run: Path, render: Render) -> None:
    page = render(audited_run, agreement=audited_run / "agreement.json")
    found = Page(page)
    assert found.row("noise multiplier σ") == ["noise multiplier σ", "1", "1.01 ± 0.02"]
    assert found.row("at least, by one run, 99 %")[1] == "2.2000"
    assert found.row("ε of the experiment’s ledger")[1] == "11.2800"
    assert found.row("rounds correlate")[1] == "0.03"
    assert found.row("area under the curve")[1] == "0.610 (0.550–0.670)"
    assert found.row("true positives at 0.1")[1] == "0.200 (0.100–0.300)"
    assert found.row("0.1") == ["0.1", "1.25", "1.2534"]
    assert "By that experiment: the noise of a GPU" in words(page)
    assert "passed The mechanism is as claimed" in words(page)


def test_what_was_not_given_is_named_as_not_checked(
    run: Path, audited_run: Path, render: Render, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    for name in ("audit.json", "membership.json", "agreement.json", "summary.json"):
        (bare / name).unlink()
    shutil.rmtree(bare / "checkpoint")
    ledger(bare, "site-2").unlink()
    text = words(render(bare)).partition("What was not checked")[2]
    for missing in (
        "The ledgers of site-2",
        "Whether the end of a ledger was cut off (site-0, site-1)",
        "no audit of the mechanism was given",
        "no audit of the result was given",
        "no table of agreement",
        "Whose keys these are",
        "That noise was really added",
        "Floating point and timing",
    ):
        assert missing in text
    assert "Not every site is covered" in words(render(bare))
    whole = words(render(audited_run)).partition("What was not checked")[2]
    assert "no audit of the mechanism" not in whole
    assert "Whether the machines of this run did what the experiment" in whole


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("UPDATE entries SET body = replace(body, '\"round\":2', '\"round\":1')", "entry 3"),
        ("DELETE FROM entries WHERE sequence = 2", "entry 2: sequence number is 3"),
        ("DELETE FROM entries WHERE sequence = 8", "the witnessed entry 8 is not in the chain"),
        ("UPDATE documents SET body = replace(body, '14.0', '15.0')", "is not what its hash says"),
    ],
)
def test_a_ledger_that_does_not_hold_is_told_in_the_first_lines(
    bract: Bract, run: Path, statement: str, fault: str
) -> None:
    spoil(ledger(run), statement)
    done = bract("audit", "report", str(run), "-o", "report.html")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    text = words(Path("report.html").read_text())
    first = text.partition("What is claimed")[0]
    assert "NOT VERIFIED" in first
    assert "site-1.sqlite" in first
    assert fault in first
    assert first.index("NOT VERIFIED") < first.index("Simulation: no guarantee")
    assert "What is claimed Nothing: a check failed" in text
    page = Page(Path("report.html").read_text())
    assert not [row for row in page.rows if row and row[0].startswith("site-1")]
    assert page.row("site-0")[1] != ""
    assert "in 2 of 3 ledgers alone" in text


def test_a_contract_with_another_signature_pins_no_key(bract: Bract, run: Path) -> None:
    signed = json.loads((run / "contract.json").read_bytes())
    signed["signature"] = "0" * 128
    (run / "contract.json").write_bytes(canonical.encode(signed))
    done = bract("audit", "report", str(run), "-o", "report.html")
    assert done.returncode == 1
    text = words(Path("report.html").read_text())
    assert "NOT VERIFIED “The contract is signed” failed" in text
    assert "No ledger that holds is here" in text


@pytest.mark.parametrize("name", ["epsilon_run", "contract_sha256"])
def test_a_summary_that_says_less_than_the_ledgers_is_a_failed_check(
    bract: Bract, run: Path, name: str
) -> None:
    summary = json.loads((run / "summary.json").read_bytes())
    if name == "epsilon_run":
        summary["per_site"]["site-1"]["epsilon_run"] /= 2
    else:
        summary["contract_sha256"] = "0" * 64
    (run / "summary.json").write_text(json.dumps(summary))
    assert bract("audit", "report", str(run), "-o", "report.html").returncode == 1
    text = words(Path("report.html").read_text())
    assert "NOT VERIFIED “The summary agrees with the ledgers” failed" in text


def test_an_audit_that_failed_and_metrics_that_say_less_are_failed_checks(
    run: Path, audited_run: Path, render: Render
) -> None:
    audit = json.loads((audited_run / "audit.json").read_bytes())
    audit |= {"passed": False, "failed": ["noise of canaries"]}
    (audited_run / "audit.json").write_text(json.dumps(audit))
    lines = [json.loads(one) for one in (run / "metrics.jsonl").read_text().splitlines()]
    lines[2]["epsilon_run"] = 0.001
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    text = words(render(run))
    assert "“The mechanism is as claimed” failed" in text
    assert "found it different: noise of canaries" in text
    assert "“The metrics’ ε covers the ledgers’” failed: round 3" in text


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        ("linear", ["privacy.mechanism=user-level"], "this run of user-level with 'linear'"),
        ("cnn", [], "this run of dp-sgd with 'cnn'"),
    ],
    ids=["mechanism", "model"],
)
def test_an_audit_of_another_mechanism_or_model_says_nothing_of_a_run(
    audited_run: Path,
    render: Render,
    tmp_path: Path,
    model: str,
    settings: list[str],
    said: str,
) -> None:
    from bract.simulations import experiment, simulation
    from bract.simulations.engines import LocalEngine

    size = {"rounds": 1, "sites": 2}
    chosen = experiment.load("digits", model=model, overrides=size, settings=settings)
    out = tmp_path / "other"
    simulation.begin(chosen, out=out, state=None, data_dir=None, workers=1).complete(LocalEngine())
    shutil.copy(audited_run / "audit.json", out)
    name, of = "The mechanism is as claimed", "audit.json is of dp-sgd with the model 'linear'"
    assert f"not done {name} {of}, {said}" in words(render(out))


@pytest.mark.parametrize(("epsilon", "result"), [(1.2534, "passed"), (1.28, "failed")])
def test_accountants_are_held_against_each_other(
    audited_run: Path, render: Render, epsilon: float, result: str
) -> None:
    rows = [{"steps": 3, "epsilon": 1.25, "epsilon_prv": epsilon, "epsilon_other": None}]
    (audited_run / "agreement.json").write_text(json.dumps({"delta": 1e-5, "rows": rows}))
    text = words(render(audited_run))
    assert f"{result} Accountants agree over many settings in 1 settings by at most" in text
    assert ("NOT VERIFIED" in text) == (result == "failed")


def test_whatever_a_file_says_is_text_on_the_page(
    audited_run: Path, render: Render, tmp_path: Path
) -> None:
    """A script as the name of a folder, a data set, a test, an experiment, a site of a summary."""
    audit = json.loads((audited_run / "audit.json").read_bytes())
    audit["p_values"] = {HOSTILE: 0.5}
    audit["epsilon_lower"] = {HOSTILE: {"0.99": 1.0}}
    audit["not_checked"] = [HOSTILE]
    (audited_run / "audit.json").write_text(json.dumps(audit))
    attacked = json.loads((audited_run / "membership.json").read_bytes())
    attacked |= {"experiment": HOSTILE, "meaning": HOSTILE}
    (audited_run / "membership.json").write_text(json.dumps(attacked))
    (audited_run / "agreement.json").write_text(json.dumps({"rows": [{HOSTILE: HOSTILE}]}))
    summary = json.loads((audited_run / "summary.json").read_bytes())
    summary["test_accuracy_by_group"] = {HOSTILE: 0.5}
    (audited_run / "summary.json").write_text(json.dumps(summary))
    key = keys.load(audited_run / "state/keys/coordinator.pem")
    agreed = contract.read(audited_run / "contract.json").contract
    data, model = agreed.data, agreed.model
    forged = agreed.model_copy(
        update={
            "data": data.model_copy(update={"name": HOSTILE}),
            "model": model.model_copy(update={"name": HOSTILE}),
        }
    )
    (audited_run / "contract.json").write_bytes(contract.sign(forged, key).to_bytes())
    spoil(ledger(audited_run), "UPDATE entries SET site = ?", HOSTILE)
    root = tmp_path / "<b>folder<b>"
    audited_run.rename(root)
    page = render(root, agreement=root / "agreement.json")
    found = Page(page)
    assert not {"script", "img", "b"} & {tag for tag, _ in found.tags}
    assert not [name for _, attributes in found.tags for name in attributes if name[:2] == "on"]
    assert "".join(found.text).count(HOSTILE) >= 8
    assert HOSTILE not in page


def test_the_page_holds_everything_that_it_shows(audited_run: Path, render: Render) -> None:
    page = render(audited_run)
    found = Page(page)
    for tag, attributes in found.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img", "image", "use"}
        assert not {"src", "href", "srcset", "xlink:href", "action", "style"} & set(attributes)
    assert not re.search(r"url\(|@import|https?://|//[a-z]", page)
    policy = {a["content"] for _, a in found.tags if a.get("http-equiv")}
    assert policy == {"default-src 'none'; style-src 'unsafe-inline'"}


def test_every_drawing_has_a_title_and_a_description_and_a_table_beside_it(
    audited_run: Path, render: Render
) -> None:
    page = render(audited_run)
    found = Page(page)
    drawings = [a for tag, a in found.tags if tag == "svg" and a.get("role") == "img"]
    assert len(drawings) == 5
    ids = [str(a["id"]) for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for drawing in drawings:
        title, description = str(drawing["aria-labelledby"]).split()
        assert {title, description} <= set(ids)
        text = re.search(rf'<desc id="{description}">([^<]+)</desc>', page)
        assert text
        assert re.search(r"\d", text[1]), "a description says the figures that matter"
    assert len([tag for tag, _ in found.tags if tag == "figure"]) == 5
    assert [tag for tag, _ in found.tags].count("caption") >= 6


def federation_of(run: Path, root: Path) -> Path:
    """Lays a run out as a federation leaves it: a folder for the coordinator, one for each site."""
    server = root / "coordinator/run"
    server.mkdir(parents=True)
    for name in ("contract.json", "metrics.jsonl", "summary.json", "model.safetensors"):
        shutil.copy(run / name, server / name)
    shutil.copy(run / "contract.json", root / "coordinator/contract.json")
    heads = head_file.heads(json.loads((run / "summary.json").read_bytes()))
    for (site, domain), head in heads.items():
        state = root / "sites" / site / "state"
        state.mkdir(parents=True)
        shutil.copy(ledger(run, site), state / "ledger.sqlite")
        shutil.copy(run / "contract.json", state.parent / "contract.json")
        head_file.HeadFile(state.parent / "head.json").write({(site, domain): head})
    return root


def test_a_federations_folder_and_one_sites_are_read_alike(
    run: Path, render: Render, tmp_path: Path
) -> None:
    root = federation_of(run, tmp_path / "federation")
    whole = Page(render(root))
    own = Page(render(run))
    for site in ("site-0", "site-1", "site-2"):
        assert whole.row(site)[1:8] == own.row(site)[1:8]
    assert "sites/site-1/head.json" in words(render(root))
    alone = render(root / "sites/site-1")
    assert Page(alone).row("site-1")[1:8] == own.row("site-1")[1:8]
    assert "Not every site is covered No ledger of site-0, site-2 is here" in words(alone)
    (root / "sites/site-1/state/ledger.sqlite").rename(root / "sites/site-1/ledger.sqlite")
    assert "Every site’s ledger is here site-1 of 3 sites: none is here" in words(render(root))


PAID = "Every update taken was paid for"


def exported(run: Path) -> None:
    """Puts exports in the place of the ledgers."""
    for path in sorted((run / "ledgers").glob("*.sqlite")):
        path.with_suffix(".jsonl").write_bytes(export.to_bytes(export.contents(path)))
        path.unlink()


def test_exports_prove_what_their_ledgers_do(bract: Bract, run: Path, render: Render) -> None:
    own = Page(render(run))
    copy = ledger(run).with_suffix(".jsonl")
    copy.write_bytes(export.to_bytes(export.contents(ledger(run))))
    assert len([row for row in Page(render(run)).rows if row and row[0] == "site-1"]) == len(
        [row for row in own.rows if row and row[0] == "site-1"]
    )  # what lies beside its own file is not counted twice
    exported(run)
    done = bract("audit", "report", str(run), "-o", "report.html")
    assert done.returncode == 0, done.stderr
    assert "3 ledgers hold" in done.stdout
    page = Page(Path("report.html").read_text())
    for site in ("site-0", "site-1", "site-2"):
        assert page.row(site)[1:8] == own.row(site)[1:8]
    text = copy.read_text().replace('"round":2', '"round":1', 1)
    copy.write_text(text)
    assert "The ledger ledgers/site-1.jsonl holds" in words(render(run))


def test_updates_that_a_server_took_are_held_against_the_ledgers(run: Path, render: Render) -> None:
    whole = f"passed {PAID} each of 12 updates that the server took, behind its charge"
    assert whole in words(render(run))
    (run / "receipts.jsonl").rename(run / "elsewhere")
    assert f"not done {PAID}" in words(render(run))
    for name in ("summary.json", "checkpoint/state.json"):
        (run / name).unlink()
    for statement in ("DELETE FROM entries WHERE sequence = 8", "DELETE FROM witnesses"):
        spoil(ledger(run), statement)
    assert "NOT VERIFIED" not in words(render(run))  # nobody else knows of the entry
    (run / "elsewhere").rename(run / "receipts.jsonl")
    text = words(render(run))
    assert "NOT VERIFIED" in text
    assert "the update received of round 4 names entry 8, which is gone" in text
    assert f"not done {PAID}" in words(render(run))


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("receipts.jsonl", "[]\n", "receipts.jsonl, line 1"),
        ("witnesses.json", "not JSON", "witnesses.json holds no heads"),
    ],
)
def test_what_others_kept_and_cannot_be_read_is_a_failed_check(
    run: Path, render: Render, name: str, content: str, fault: str
) -> None:
    (run / name).write_text(content)
    page = render(run)
    assert f"failed What others kept can be read {fault}" in words(page)
    read = name == "witnesses.json"
    assert f"{'passed' if read else 'not done'} {PAID}" in words(page)
    assert str(run) not in page


def test_a_pulled_folder_with_exports_is_anchored_by_its_witnesses(
    run: Path, render: Render, tmp_path: Path
) -> None:
    root = tmp_path / "pulled"
    (root / "ledgers").mkdir(parents=True)
    seen = []
    for path in sorted((run / "ledgers").glob("*.sqlite")):
        seen += [witness.from_bytes(text) for text in export.contents(path).witnesses.values()]
    exported(run)
    for path in (run / "ledgers").iterdir():
        shutil.copy(path, root / "ledgers")
    for name in ("contract.json", "receipts.jsonl"):
        shutil.copy(run / name, root)
    assert "not done No known entry is missing" in words(render(root))
    (root / "witnesses.json").write_bytes(anchors.to_bytes(seen))
    text = words(render(root))
    assert "passed No known entry is missing the heads in witnesses.json are in the ledgers" in text
    assert f"passed {PAID}" in text


def test_a_copy_beside_a_ledger_is_read_and_may_not_hold_more(
    run: Path, render: Render, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(run, root)
    (root / "summary.json").unlink()
    shutil.rmtree(root / "checkpoint")
    (root / "ledgers/site-1.jsonl").write_bytes(export.to_bytes(export.contents(ledger(root))))
    assert "The ledger ledgers/site-1.sqlite holds" not in words(render(root))
    spoil(ledger(root), "DELETE FROM witnesses")
    spoil(ledger(root), "DELETE FROM entries WHERE sequence = 8")
    text = words(render(root))
    assert "failed The ledger ledgers/site-1.sqlite holds ledger of 'site-1', domain " in text
    assert "ledgers/site-1.jsonl holds entries that ledgers/site-1.sqlite lacks" in text


def test_a_copy_that_is_no_export_is_told_without_its_path(
    run: Path, render: Render, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(run, root)
    (root / "ledgers/site-1.jsonl").write_text("no export")
    page = render(root)
    assert "failed The ledger ledgers/site-1.sqlite holds site-1.jsonl" in words(page)
    assert str(root) not in page


def test_two_histories_of_one_site_fail(run: Path, render: Render, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(run, root)
    other = root / "ledgers/another.sqlite"
    shutil.copy(ledger(root), other)
    assert "two histories" not in words(render(root))  # it is the same one
    spoil(other, "UPDATE entries SET body = replace(body, '\"round\":2', '\"round\":1')")
    assert "two histories of 'site-1'" in words(render(root))


def test_a_head_that_is_not_in_the_ledger_fails(run: Path, render: Render, tmp_path: Path) -> None:
    root = federation_of(run, tmp_path / "federation")
    for statement in ("DELETE FROM entries WHERE sequence = 8", "DELETE FROM witnesses"):
        spoil(root / "sites/site-1/state/ledger.sqlite", statement)
    assert "cut short, ends at entry 7 but the anchor names entry 8" in words(render(root))


def test_a_run_without_noise_claims_nothing(run: Path, render: Render, tmp_path: Path) -> None:
    from bract.simulations import experiment, simulation
    from bract.simulations.engines import LocalEngine

    chosen = experiment.load(
        "digits",
        model="linear",
        overrides={"rounds": 1, "sites": 2},
        settings=["privacy.mechanism=none"],
    )
    plain = tmp_path / "plain"
    simulation.begin(chosen, out=plain, state=None, data_dir=None, workers=1).complete(
        LocalEngine()
    )
    page = render(plain)
    assert "No privacy: unprotected run" in words(page)
    assert "What is claimed Nothing: updates left the sites without noise" in words(page)
    assert Page(page).row("site-0")[1] == "unbounded"


def test_an_officer_needs_neither_torch_nor_opacus(audited_run: Path, tmp_path: Path) -> None:
    script = """
import sys
from bract.shared.cli import bract
bract.main(["audit", "report", sys.argv[1], "-o", sys.argv[2]], standalone_mode=False)
sys.exit(repr(found) if (found := {"torch", "opacus", "flwr"} & set(sys.modules)) else 0)
"""
    command = [sys.executable, "-c", script, str(audited_run), str(tmp_path / "report.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("spoilt", "says"),
    [
        ("nowhere", "no folder"),
        ("contract.json", "holds no contract.json"),
        ("audit.json", "is not JSON"),
        ("membership.json", "is not JSON"),
        ("metrics.jsonl", "JSON lines"),
        ("--experiment", "correct --experiment"),
        ("--agreement", "correct --agreement"),
        ("output", "nothing is overwritten"),
    ],
)
def test_bad_usage_is_one_line_and_leaves_no_page(
    bract: Bract, audited_run: Path, spoilt: str, says: str
) -> None:
    root, more = audited_run, list[str]()
    if spoilt == "nowhere":
        root = audited_run / "nowhere"
    elif spoilt == "contract.json":
        (root / spoilt).unlink()
    elif spoilt.startswith("--"):
        more = [spoilt, str(root / "state")]
    elif spoilt == "output":
        Path("report.html").write_text("mine")
    else:
        (root / spoilt).write_text("{half\n")
    done = bract("audit", "report", str(root), "-o", "report.html", *more)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path("report.html").exists() or spoilt == "output"


def test_a_folder_without_a_ledger_proves_nothing(bract: Bract, run: Path) -> None:
    shutil.rmtree(run / "ledgers")
    done = bract("audit", "report", str(run), "-o", "report.html")
    assert done.returncode == 1
    assert "there is no ledger" in done.stderr
    text = words(Path("report.html").read_text())
    assert "Nothing was verified" in text.partition("What is claimed")[0]
    assert "What is claimed Nothing: no ledger was verified" in text


def test_a_bound_is_rounded_up_and_never_down() -> None:
    assert wording.factor(0.0) == "1.00"
    assert wording.factor(2.3025851) == "10.01", "e to it is 10.0000000…"
    assert wording.factor(5.0) == "149"
    assert wording.factor(700.0) == "over a million"


def test_lines_stay_within_their_drawing() -> None:
    chart = charts.lines(
        "x",
        title="",
        description="",
        labels=("", ""),
        series=[("one", [(0, 0.0), (50, 99.0), (100, -3.0)])],
        x_range=(0, 100),
        y_range=(0, 10),
    )
    points = [tuple(map(float, pair.split(","))) for pair in chart.lines[0].points.split()]
    assert all(chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y in points)
    assert points[0] == (chart.left, chart.bottom)
