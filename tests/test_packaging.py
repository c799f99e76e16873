"""What an installed jaxling looks like, and what it needs."""

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOT_NEEDED_BY_KERNELS = (
    "absl flax transformers optax orbax huggingface_hub safetensors pyarrow fontTools"
    " matplotlib plotly tqdm torch sklearn scipy beartype"
).split()


def run(*command: str, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """A wheel built from a copy of the tree, so that the tree stays clean."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).stdout
    for name in listed.splitlines():
        if (ROOT / name).exists():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--quiet", "--wheel-dir", str(folder), str(folder / "source")),
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_owns_one_name_and_stays_small(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"jaxling"}
    assert "jaxling/kernels/numerics.py" in names
    assert "jaxling/experiments/common.py" in names
    assert wheel.stat().st_size <= 20e6


def test_kernels_need_jax_numpy_and_jaxtyping_alone(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(site)!r})
        for name in {NOT_NEEDED_BY_KERNELS!r}:
            sys.modules[name] = None  # an import of it raises ImportError
        import jaxling
        assert jaxling.__file__.startswith({str(site)!r}), jaxling.__file__
        import numpy as np
        from jaxling.kernels import numerics
        lengths = numerics.row_norms(np.array([[3.0, 4.0]], np.float32))
        assert lengths.tolist() == [5.0]
        """
    )
    run(sys.executable, "-P", "-c", program, cwd=tmp_path, env=dict(os.environ))


def test_transformers_models_import_from_the_root_beside_the_other_kernels(tmp_path):
    """Hugging Face's package of that name is probed for when a model is imported."""
    pytest.importorskip("torch")
    if not has_distribution("kernels"):
        pytest.skip("Hugging Face's `kernels` is not installed")
    program = "from transformers import LlamaForCausalLM"
    run(sys.executable, "-c", program, cwd=ROOT, env=dict(os.environ))


def has_distribution(name: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
