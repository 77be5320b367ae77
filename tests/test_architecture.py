"""The house stays as it was laid: floors, packages, imports, and what the wheel holds."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("shared", "client", "server", "simulations")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


RIVALS = ROOT / "simulations/benchmarks/rivals"
# Scripts of an environment without bract.
ELSEWHERE = {RIVALS / "flower_ray.py", RIVALS / "pfl_cohort.py"}


def sources(floor: str) -> list[Path]:
    return sorted(path for path in (ROOT / floor).rglob("*.py") if path not in ELSEWHERE)


def imports(path: Path) -> set[str]:
    """Every module a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def under(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize(
    ("floor", "forbidden"),
    [
        ("shared", ("bract.client", "bract.server", "bract.simulations")),
        ("client", ("bract.server", "bract.simulations")),
        ("server", ("bract.client", "bract.simulations")),
    ],
)
def test_imports_go_down_only(floor: str, forbidden: tuple[str, ...]) -> None:
    wrong = [(str(p), n) for p in sources(floor) for n in imports(p) if under(n, *forbidden)]
    assert wrong == []


def test_only_a_simulation_can_import_the_faults_that_audits_plant() -> None:
    audits = "bract.simulations.audits"
    for floor in ("shared", "client", "server"):
        for path in sources(floor):
            assert not any(under(name, audits) for name in imports(path)), path
            if path != ROOT / "shared/cli.py":  # the one table of references upward, as text
                assert audits not in path.read_text(), path
    assert f"{audits}.faults" not in (ROOT / "shared/cli.py").read_text()
    users = {
        path.relative_to(ROOT).as_posix()
        for path in sources("simulations")
        if any(under(name, f"{audits}.faults") for name in imports(path))
    }
    assert users == {"simulations/benchmarks/planted_faults.py"}


def test_only_the_private_step_its_cells_and_the_second_accountant_import_opacus() -> None:
    users = {
        p for floor in FLOORS for p in sources(floor) if any(under(n, "opacus") for n in imports(p))
    }
    rival = ROOT / "simulations/benchmarks/private_step.py"  # which we measure against
    shared = {ROOT / "shared/privacy/prv.py", ROOT / "shared/models/lstm.py"}
    allowed = {*shared, rival, *(ROOT / "client/training").glob("*.py")}
    assert users <= allowed
    assert ROOT / "client/training/optimizer.py" in users


def test_only_one_module_a_side_touches_flowers_internals() -> None:
    public = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
    for floor in FLOORS:
        users = {
            path.relative_to(ROOT / floor).parts[0].removesuffix(".py")
            for path in sources(floor)
            for name in imports(path)
            if under(name, "flwr") and not under(name, *public)
        }
        assert users <= {"flower"}, floor


def test_only_the_engine_on_ray_imports_ray() -> None:
    users = {
        p for floor in FLOORS for p in sources(floor) if any(under(n, "ray") for n in imports(p))
    }
    assert users == {ROOT / "simulations/flower.py"}


def test_only_the_auditors_service_and_its_client_import_grpc() -> None:
    users = {
        path.relative_to(ROOT)
        for floor in FLOORS
        for path in sources(floor)
        if any(under(n, "grpc", "grpc_health", "grpc_reflection") for n in imports(path))
    }
    generated = Path("shared/proto/audit_pb2_grpc.py")
    assert users == {Path("server/auditing.py"), Path("shared/auditor.py"), generated}


def test_only_the_wire_module_knows_message_keys() -> None:
    keys = {"weights", "order", "unprotected-update", "receipt", "refusal"}
    for floor in FLOORS:
        for path in sources(floor):
            if path.name != "wire.py":
                subscripts = [
                    node.slice.value
                    for node in ast.walk(ast.parse(path.read_text()))
                    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
                ]
                assert not keys & {str(value) for value in subscripts}, path


def test_nothing_is_pickled_and_nothing_is_evaluated() -> None:
    for floor in FLOORS:
        for path in sources(floor):
            names = imports(path)
            assert not any(under(n, "pickle", "dill", "cloudpickle", "marshal") for n in names), (
                path
            )
            calls = [
                node.func.id
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            ]
            assert not {"eval", "exec", "compile"} & set(calls), path
            assert not re.search(r"torch\.(load|save)\(|allow_pickle=True", path.read_text()), path


def test_packages_equal_folders() -> None:
    folders = {
        "bract." + ".".join(path.parent.relative_to(ROOT).parts)
        for floor in FLOORS
        for path in (ROOT / floor).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders


def test_floors_have_links_for_type_checkers() -> None:
    for floor in FLOORS:
        assert (ROOT / ".types/bract" / floor).resolve() == ROOT / floor


def modules() -> list[str]:
    found = []
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        found.append(package)
        found += [
            f"{package}.{module.name}"
            for module in pkgutil.iter_modules(importlib.import_module(package).__path__)
            if not module.ispkg and module.name != "__main__"
        ]
    elsewhere = {f"bract.{path.relative_to(ROOT).with_suffix('')}" for path in ELSEWHERE}
    return [name for name in found if name not in {one.replace("/", ".") for one in elsewhere}]


@pytest.mark.parametrize("name", modules())
def test_doctests_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_help_is_instant_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['bract', '--help']\n"
        "from bract.shared import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'flwr', 'numpy', 'rich', 'pydantic', 'opacus'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.rstrip().endswith("[]")
    assert "simulate" in out.stdout


def synopsis() -> dict[str, set[str]]:
    """The options that the README promises, by command."""
    block = re.search(r"## Commands\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block
    text = re.sub(r"\n +", " ", block[1])
    return {
        match[1].strip(): set(re.findall(r"--[a-z-]+", line))
        for line in text.splitlines()
        if (match := re.match(r"bract ((?:(?:audit|contract|keys|model) )?[a-z]+)", line))
    }


def commands() -> dict[str, click.Command]:
    from bract.shared.cli import bract

    context = click.Context(bract)
    found: dict[str, click.Command] = {}
    for name in bract.list_commands(context):
        command = bract.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                c = command.get_command(context, inner)
                assert c is not None
                found[f"{name} {inner}"] = c
        else:
            found[name] = command
    return found


def test_every_command_is_in_the_readme_with_its_options() -> None:
    shipped = {
        name: {
            option
            for p in c.params
            if isinstance(p, click.Option)
            for option in p.opts
            if option.startswith("--")
        }
        for name, c in commands().items()
    }
    assert shipped == synopsis()


def test_every_command_shows_an_example() -> None:
    for name, command in commands().items():
        assert "Example: bract " + name in (command.epilog or ""), name


def test_schemas_that_ship_are_those_of_the_reports() -> None:
    from bract.shared.reports import REPORTS, schema

    for name in REPORTS:
        shipped = json.loads((ROOT / f"shared/schemas/{name}.schema.json").read_text())
        assert shipped == schema(name), "run python -m bract.shared.schemas"


def test_the_wheel_holds_every_package_and_runs_outside_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    wheel = next(tmp_path.glob("bract-*.whl"))
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    assert (site / "bract/simulations/federations/stock/pyproject.toml").exists()
    # The dependencies of this environment, without its editable bract: nested .pth are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = "from bract.shared.cli import main; main()"
    alone = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [python, "-c", command, "simulate", "digits", "--rounds", "1", "--json"],
        cwd=tmp_path,
        env=alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == 1
    where = subprocess.run(
        [python, "-c", "import bract.shared as s; print(s.__file__)"],
        cwd=tmp_path,
        env=alone,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(site) in where.stdout


def test_the_source_distribution_holds_what_the_checkout_holds(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout of git")
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True)  # noqa: S607  whichever git
    # Links for type checkers, and what only a checkout has, are of no use in it.
    tracked = {name for name in listed.splitlines() if not name.startswith(".")}
    for name in tracked:  # without what an earlier build left, which would be taken along
        copy = tmp_path / "checkout" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(tmp_path / "checkout")], check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("bract-*.tar.gz"))) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    assert tracked - names == set()
