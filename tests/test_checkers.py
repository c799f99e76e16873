"""The linter and the formatter have nothing to say."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check"])
def test_it_finds_nothing(command):
    """With the settings of pyproject.toml, as a person runs them."""
    tool, *arguments = command.split()
    pytest.importorskip(tool)
    done = subprocess.run(
        [sys.executable, "-m", tool, *arguments, "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
