"""The layers' arrows, the names section and the shape of the scripts."""

import ast
import importlib
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

from jaxling.experiments import __main__ as listing

ROOT = pathlib.Path(__file__).resolve().parents[1]
KERNELS_MAY = {"jax", "jaxlib", "numpy", "jaxtyping", "ml_dtypes"}
JAXLING_NEVER = {"absl", "experiments", "kernels"}
TORCH_ROOM = ROOT / "jaxling" / "checkpoints" / "torch_files.py"


def sources(folder: str) -> list[pathlib.Path]:
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", f"{folder}/*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [ROOT / file for file in files if (ROOT / file).exists()]


def imported(path: pathlib.Path) -> set[str]:
    """Absolute top-level packages, and jaxling's own modules by dotted name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return names


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_kernels_import_arrays_only():
    files = sources("kernels")
    assert files
    for path in files:
        foreign = tops(imported(path)) - KERNELS_MAY - set(sys.stdlib_module_names)
        assert not foreign, f"{path} imports {foreign}"


def test_jaxling_imports_no_experiment_no_absl_no_torch():
    files = sources("jaxling")
    assert files
    for path in files:
        names = imported(path)
        bad = tops(names) & JAXLING_NEVER
        bad |= {name for name in names if name.startswith("jaxling.experiments")}
        if path != TORCH_ROOM:
            bad |= tops(names) & {"torch"}
        assert not bad, f"{path} imports {bad}"


def test_experiments_hold_no_mathematics():
    for path in sources("experiments"):
        if "benchmarks" not in path.parts:
            names = imported(path)
            bad = {n for n in names if n.startswith(("jax.numpy", "jax.lax", "torch"))}
            assert not bad, f"{path} imports {bad}"


def test_siblings_are_imported_relatively():
    for folder in ("kernels", "experiments"):
        for path in sources(folder):
            own = f"jaxling.{folder}"
            assert not {n for n in imported(path) if n.startswith(own)}, path


@pytest.mark.parametrize("path", listing.scripts(), ids=lambda path: path.stem)
def test_every_experiment_states_its_question_and_number(path):
    found = listing.describe(path)
    assert found["command"].startswith(f"python -m experiments.{path.stem}")


@pytest.mark.parametrize("path", listing.scripts(), ids=lambda path: path.stem)
def test_scripts_live_together_in_one_process(path):
    module = importlib.import_module(f"jaxling.experiments.{path.stem}")
    assert callable(module.main)


FAKE = "__version__ = '0.18.2'\nclass CUDAProperties: pass\n"


@pytest.mark.parametrize("installed", [True, False])
def test_the_name_kernels_is_left_to_its_owner(tmp_path, installed):
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text(FAKE)
    expected = "0.18.2" if installed else "0"
    program = textwrap.dedent(
        f"""
        import sys
        others = [path for path in sys.path if "site-packages" not in path]
        sys.path = [{str(ROOT)!r}, *others, {str(tmp_path)!r}]
        import kernels
        assert kernels.__version__ == {expected!r}, kernels
        assert hasattr(kernels, "CUDAProperties") == {installed}
        """
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=dict(os.environ))


def test_the_readme_counts_the_lines_of_the_families():
    """`name lines, name lines`: all files that define a family, the shortest first."""
    lines = {
        path.stem: len(path.read_text("utf-8").splitlines())
        for path in (ROOT / "jaxling" / "models").glob("*.py")
        if re.search(r"^FAMILY\w* = ", path.read_text("utf-8"), re.MULTILINE)
    }
    assert len(lines) > 10
    counted = sorted((count, name) for name, count in lines.items())
    text = ", ".join(f"{name} {count}" for count, name in counted)
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"Lines: {text}." in readme


def test_the_readme_lists_the_experiments_as_they_describe_themselves():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert listing.markdown() in readme, "python -m experiments --markdown"


def test_a_reader_who_has_seen_enough_ends_the_list():
    done = subprocess.run(
        f"{sys.executable} -u -m experiments | head -n 1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() and done.stderr == ""


ROOMS = (
    "kernels checkpoints vocabulary writing_systems sweeps models training probes lens"
    " retrieval corpus"
).split()


def public(room: str) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """Functions and classes that a room defines, or names `as` themselves."""

    def defined(path: pathlib.Path) -> dict[str, ast.FunctionDef | ast.ClassDef]:
        body = ast.parse(path.read_text("utf-8")).body
        kinds = ast.FunctionDef | ast.ClassDef
        return {node.name: node for node in body if isinstance(node, kinds)}

    folder = ROOT / "jaxling" / room
    if not folder.is_dir():
        found = defined(folder.with_suffix(".py"))
    else:
        found = defined(folder / "__init__.py")
        for node in ast.walk(ast.parse((folder / "__init__.py").read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [a.name for a in node.names if a.asname == a.name]
                path = folder / f"{node.module.split('.')[-1]}.py"
                if names:
                    own = defined(path)
                    found |= {name: own[name] for name in names if name in own}
    return {name: node for name, node in found.items() if not name.startswith("_")}


def test_the_readme_lists_every_public_function_and_none_that_is_not():
    """Under its room: a line for each, with its arguments in front of the knobs.

    Types may stand behind the arrow of a function that returns or takes them.
    """
    readme = (ROOT / "README.md").read_text("utf-8")
    section = readme.partition("## The public functions at a glance")[2]
    section = section.partition("\n## ")[0]
    parts = re.split(r"```\n(.*?)```\n", section, flags=re.DOTALL)
    blocks = dict.fromkeys(ROOMS, "")
    waiting: list[str] = []
    for text, block in zip(parts[::2], parts[1::2]):
        waiting += re.findall(r"`jaxling\.(\w+)`", text)
        blocks[waiting.pop(0)] = block
    assert list(blocks) == ROOMS and not waiting
    for room, block in blocks.items():
        nodes, listed = public(room), set()
        for line in block.splitlines():
            assert len(line) <= 100, line
            shown = re.match(r"(\w+)(?:\((.*?)\))?(?: -> ((?:\w+, )*\w+))?  +\S", line)
            assert shown, line
            name, arguments, types = shown.groups()
            assert name in nodes, f"{room}.{name} is not there"
            listed |= {name, *(types or "").replace(",", "").split()}
            node = nodes[name]
            if not isinstance(node, ast.FunctionDef):
                assert arguments is None, line
                continue
            given = node.args.args + ([node.args.vararg] if node.args.vararg else [])
            needed = len(node.args.args) - len(node.args.defaults)
            told = [one for one in (arguments or "").split(", ") if one]
            expected = [
                arg.arg + "?" * (needed <= i < len(node.args.args))
                for i, arg in enumerate(given)
            ]
            assert told == expected[: len(told)], (line, expected)
            assert all(one.endswith("?") for one in expected[len(told) :]), line
        assert listed == set(nodes), f"{room}: {listed ^ set(nodes)}"
