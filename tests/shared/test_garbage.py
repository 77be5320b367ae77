import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bract.shared import garbage


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.enable()


def test_what_an_import_leaves_is_set_apart_and_the_collector_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with garbage.unwatched():
        assert not gc.isenabled()
        import this  # noqa: F401
    assert gc.isenabled()
    assert gc.get_freeze_count() > 10_000


def test_without_an_import_nothing_is_set_apart() -> None:
    with garbage.unwatched():
        import gc as again  # noqa: F401
    assert gc.get_freeze_count() == 0


def test_the_collector_goes_on_after_an_import_that_fails() -> None:
    with pytest.raises(ModuleNotFoundError), garbage.unwatched():
        import bract.no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with garbage.unwatched():
        pass
    assert not gc.isenabled()


def test_a_command_imports_and_ends_without_a_look_for_garbage() -> None:
    program = (
        "import atexit, gc, sys\n"
        "looks = []\n"
        "gc.callbacks.append(lambda phase, facts: looks.append(facts['generation']))\n"
        "atexit.register(lambda: print(looks.count(2), len(gc.get_objects())))\n"
        "from bract.shared.cli import main\n"
        "main()\n"
    )
    words = "calibrate --examples 100 --batch 10 --rounds 1 --steps 1 --epsilon 1 --delta 1e-3"
    done = subprocess.run(
        [sys.executable, "-c", program, *words.split()], capture_output=True, text=True, check=True
    )
    looks, objects = map(int, done.stdout.splitlines()[-1].split())
    assert looks == 0
    assert objects < 10_000  # of more than 300,000
