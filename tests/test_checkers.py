"""The linter, the formatter and the type checker have nothing to say."""

import importlib.metadata
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def ran(*command: str) -> subprocess.CompletedProcess:
    """A tool with the project's settings, as a person runs it."""
    tool, *arguments = command
    pytest.importorskip(tool)
    return subprocess.run(
        [sys.executable, "-m", tool, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_the_linter_finds_nothing(command):
    done = ran("ruff", *command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_type_checker_finds_nothing_in_any_file():
    """And looks at every file of the package, the two linked folders among them."""
    done = ran("mypy")
    # NumPy 2.5 describes its methods in a way that mypy 2.4 does not understand.
    versions = [
        tuple(map(int, importlib.metadata.version(name).split(".")[:2]))
        for name in ("numpy", "mypy")
    ]
    if done.returncode and versions[0] >= (2, 5) and versions[1] <= (2, 4):
        pytest.skip("mypy up to 2.4 does not understand NumPy from 2.5 on")
    assert done.returncode == 0, done.stdout + done.stderr
    folders = ROOT / "jaxling", ROOT / "kernels", ROOT / "experiments"
    files = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    # It counts folders of data as well.
    assert int(done.stdout.split()[-3]) >= len(files), done.stdout
