"""The house itself: what stands at the top, what it is licensed under, what the lock pins, what no file may say."""

import hashlib
import importlib
import pathlib
import re
import subprocess
import tomllib
from typing import Any

import pytest
from packaging import requirements, utils, version

ROOT = pathlib.Path(__file__).parent.parent
CODE = ("diffusion_kd", "training", "eval", "serve")
FILES = ("pyproject.toml", "requirements.lock", "Makefile", "LICENSE", ".ci/run", ".gitignore")
# The whole plan of the top; anything else there is a stray.
PLANNED = {*CODE, *FILES, "tests", "docs", "benchmarks", ".ci", ".gitattributes", ".dockerignore"} | {
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "NOTICE", "Dockerfile", "compose.yaml", "app.py"),
}
UNLOCKED_EXTRAS = {"bitsandbytes", "xformers"}
# https://www.apache.org/licenses/LICENSE-2.0.txt
APACHE_2_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
MACHINE_PATH = re.compile(rb"(?<![\w.~-])/(?:work|root)/")


def kept_files() -> list[pathlib.Path]:
    """What git keeps or would keep, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [path for name in listed.split("\0") if name and (ROOT / (path := pathlib.Path(name))).is_file()]


def project() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return loaded


def pins() -> dict[str, version.Version]:
    """Canonical name -> version; every line of the lock must be `name==version`."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    parts = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {utils.canonicalize_name(name): version.Version(pinned) for name, pinned in parts}


def direct_dependencies() -> list[requirements.Requirement]:
    extras = project()["optional-dependencies"]
    assert extras.keys() >= UNLOCKED_EXTRAS
    locked = [extras[name] for name in extras.keys() - UNLOCKED_EXTRAS]
    return [requirements.Requirement(line) for lines in (project()["dependencies"], *locked) for line in lines]


@pytest.mark.parametrize("name", CODE)
def test_package_is_the_one_of_this_checkout(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert pathlib.Path(module.__file__) == ROOT / name / "__init__.py"


@pytest.mark.parametrize("name", FILES)
def test_file_stands_at_the_top(name: str) -> None:
    assert (ROOT / name).is_file()


def test_nothing_unplanned_stands_at_the_top() -> None:
    assert {path.parts[0] for path in kept_files()} <= PLANNED


def test_no_package_hides_the_code_under_tests() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_ci_is_executable() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_license_is_the_unmodified_apache_2() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_SHA256
    assert project()["license"] == "Apache-2.0"


def test_lock_pins_every_direct_dependency_within_its_bounds() -> None:
    locked = pins()
    for requirement in direct_dependencies():
        name = utils.canonicalize_name(requirement.name)
        assert name in locked, f"{name} is not in requirements.lock; run make lock"
        assert locked[name] in requirement.specifier, f"{name} {locked[name]} is outside {requirement.specifier}"


def test_lock_fits_every_machine() -> None:
    locked = pins()
    assert all(pinned.local is None for pinned in locked.values())
    assert [name for name in locked if name.startswith(("nvidia-", "cuda-", "triton", "xformers"))] == []


def test_no_file_names_a_path_of_a_machine() -> None:
    assert [str(path) for path in kept_files() if MACHINE_PATH.search((ROOT / path).read_bytes())] == []


@pytest.mark.parametrize("text", [b"/work" + b"/main", b'"/root' + b'/x"', b"=/work" + b"/"])
def test_machine_path_is_recognised(text: bytes) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", [b"./work/", b"my/root/", b"/network/", b"/workspace/"])
def test_other_paths_are_not(text: bytes) -> None:
    assert not MACHINE_PATH.search(text)
