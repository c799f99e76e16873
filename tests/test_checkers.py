"""The linter, the formatter and the type checker have nothing to say."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "mypy"])
def test_it_finds_nothing(command):
    """With the settings of pyproject.toml and setup.cfg, as a person runs them."""
    tool, *arguments = command.split()
    pytest.importorskip(tool)
    done = subprocess.run(
        [sys.executable, "-m", tool, *arguments, *(["."] if tool == "ruff" else [])],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
