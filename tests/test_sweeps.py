"""Sweeps: equal to their definition, whatever the panels, crashes and damage."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import oracles
import pytest

from jaxling import sweeps

PANEL = 64  # one compiled shape for all tests of a metric
K = 7


@pytest.fixture
def matrix(rng):
    """Three panels and a bit: with copies, a zero row and rows that are not finite."""
    x = rng.standard_normal((3 * PANEL + 9, 8)).astype(np.float32)
    x[70], x[150] = x[3], x[3]
    x[20], x[130, 2], x[199, 0] = 0, np.nan, np.inf
    return x


def sweep(matrix, **knobs):
    return sweeps.sweep_neighbors(
        matrix, **{"k": K, "panel": PANEL, "progress": False, **knobs}
    )


def assert_neighbors(found, matrix, metric="cosine", rows=None, skip=()):
    """`found` has the oracle's scores, and ids whose true scores are as good."""
    x = matrix.astype(np.float64)
    x[list(skip)] = np.nan
    rows = np.arange(len(x)) if rows is None else rows
    k = found.indices.shape[1]
    expected, ids = oracles.neighbors(x[rows], x, k, metric, excluded=rows)
    close = oracles.closeness(x[rows], x, metric) * (-1 if metric == "l2" else 1)
    np.testing.assert_array_equal(found.indices < 0, ids < 0)
    reached = np.take_along_axis(close, np.maximum(found.indices, 0), axis=1)
    reached[ids < 0] = np.nan
    # Float32 sums of 8 products of numbers of size one, or of squares below 40.
    np.testing.assert_allclose(found.scores, expected, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(reached, expected, rtol=1e-6, atol=2e-6)
    assert (found.indices != rows[:, None]).all()
    for line in found.indices:
        kept = line[line >= 0]
        assert len(set(kept)) == len(kept)


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_panels_match_the_oracle(matrix, metric):
    found = sweep(matrix, metric=metric)
    assert (found.bands, found.resumed) == (4, 0)
    assert found.rate > 0
    assert_neighbors(found, matrix, metric)


@pytest.mark.parametrize("panel", [1, 5, 200, 201, 1000])
def test_the_panel_changes_nothing_but_rounding(matrix, panel):
    found = sweep(matrix[:41] if panel < 10 else matrix, panel=panel)
    assert_neighbors(found, matrix[:41] if panel < 10 else matrix)


def test_bfloat16_and_a_memory_map(matrix, tmp_path):
    x = np.nan_to_num(matrix, posinf=1).astype(ml_dtypes.bfloat16)
    assert_neighbors(sweep(x), x.astype(np.float32))
    np.save(tmp_path / "x.npy", matrix)
    mapped = sweep(np.load(tmp_path / "x.npy", mmap_mode="r"))
    np.testing.assert_array_equal(mapped.indices, sweep(matrix).indices)


def test_more_neighbours_than_rows(matrix):
    found = sweep(matrix[:5], k=K)
    assert_neighbors(found, matrix[:5])
    assert (found.indices[:, 4:] == -1).all()


def test_some_rows_are_those_lines_of_all(matrix):
    rows = np.array([0, 3, 20, 69, 70, 128, 200])
    some = sweep(matrix, rows=rows)
    assert_neighbors(some, matrix, rows=rows)
    np.testing.assert_array_equal(some.indices, sweep(matrix).indices[rows])


@pytest.mark.parametrize("rows", [None, np.arange(0, 200, 7)])
def test_skipped_rows_are_absent(matrix, rows):
    skip = np.array([3, 64, 65, 196])
    found = sweep(matrix, skip=skip, rows=rows)
    assert_neighbors(found, matrix, rows=rows, skip=skip)
    assert not np.isin(found.indices, skip).any()


def test_rows_without_direction_are_named(matrix):
    assert sweeps.invalid_rows(matrix).tolist() == [20, 130, 199]
    assert sweeps.invalid_rows(matrix[:0]).tolist() == []


class Crash(BaseException):
    """Stands for whatever ends a process between two bands."""


def crash_after(monkeypatch, bands):
    save = sweeps._save

    def limited(path, inputs, done, best):
        save(path, inputs, done, best)
        if done == bands:
            raise Crash

    monkeypatch.setattr(sweeps, "_save", limited)


@pytest.mark.parametrize("rows", [None, np.arange(0, 200, 3)])
def test_a_crash_changes_nothing(matrix, tmp_path, monkeypatch, rows):
    whole = sweep(matrix, rows=rows, path=tmp_path / "whole")
    for done in (1, 3):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            crash_after(patch, done)
            sweep(matrix, rows=rows, path=tmp_path / "state")
    resumed = sweep(matrix, rows=rows, path=tmp_path / "state")
    assert resumed.resumed == 3
    assert resumed.scores.tobytes() == whole.scores.tobytes()
    assert resumed.indices.tobytes() == whole.indices.tobytes()
    assert (tmp_path / "state").read_bytes() == (tmp_path / "whole").read_bytes()
    again = sweep(matrix, rows=rows, path=tmp_path / "state")
    assert again.resumed == again.bands == 4 and again.rate == 0
    assert again.indices.tobytes() == whole.indices.tobytes()


@pytest.mark.parametrize("damage", ["checksum", "header", "scores", "cut", "empty"])
def test_damage_is_detected_and_recomputed(matrix, tmp_path, damage):
    path = tmp_path / "state"
    whole = sweep(matrix, path=path)
    content = bytearray(path.read_bytes())
    if damage in ("cut", "empty"):
        content = content[: -1000 if damage == "cut" else 0]
    else:
        content[{"checksum": 5, "header": 90, "scores": 3000}[damage]] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="state is damaged"):
        again = sweep(matrix, path=path)
    assert again.resumed == 0
    assert again.indices.tobytes() == whole.indices.tobytes()


@pytest.mark.parametrize(
    "change",
    [{"k": 6}, {"metric": "dot"}, {"panel": 128}, {"rows": np.arange(9)}, "matrix"],
    ids=str,
)
def test_the_state_of_another_sweep_is_refused(matrix, tmp_path, change):
    path = tmp_path / "state"
    sweep(matrix, path=path)
    before = path.read_bytes()
    if change == "matrix":
        change, matrix = {}, matrix + np.float32(1e-7)
    with pytest.raises(ValueError, match="another sweep: [a-z]+ was .* is now"):
        sweep(matrix, path=path, **change)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"panel": 0}, "`panel`.*got 0"),
        ({"k": 0}, "`k`.*got 0"),
        ({"k": 2.5}, "`k`.*integer.*got 2.5"),
        ({"k": True}, "`k`.*integer.*got True"),
        ({"panel": 64.0}, "`panel`.*integer.*got 64.0"),
        ({"metric": "manhattan"}, "`metric`.*manhattan"),
        ({"rows": np.array([3, 3])}, r"`rows`.*\[0, 201\)"),
        ({"rows": np.array([201])}, "`rows`"),
        ({"skip": np.array([-1])}, "`skip`"),
    ],
)
def test_bad_arguments_are_named(matrix, wrong, message):
    with pytest.raises(ValueError, match=message):
        sweep(matrix, **wrong)


def test_a_matrix_of_integers_is_refused():
    with pytest.raises(ValueError, match=r"`matrix`.*\(3, 2\).*int64"):
        sweep(np.ones((3, 2), np.int64))


def in_a_process(program, *arguments, **variables):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=pathlib.Path(__file__).parents[1],
        env=os.environ | variables,
    )


# Ends itself by SIGKILL before line number `stop` of those that it runs of sweeps.py:
# of all, or of those that write the state. If it is not ended it says how many.
KILLED = """
    import os, signal, sys
    import numpy as np
    from jaxling import sweeps
    folder, which, stop, k, panel = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    lines = 0
    def line(frame, event, arg):
        global lines
        lines += event == "line"
        if lines == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return line
    def call(frame, event, arg):
        code = frame.f_code
        if code.co_filename == sweeps.__file__ and code.co_name.startswith(which):
            return line
    matrix = np.load(f"{folder}/x.npy")
    sys.settrace(call)
    sweeps.sweep_neighbors(matrix, k=k, panel=panel, path=f"{folder}/{which}-{stop}",
                           progress=False)
    print(lines)
"""


def test_killed_at_any_line_it_resumes_to_the_same_bytes(matrix, tmp_path):
    """SIGKILL at random lines: three of all, and three while the state is written."""
    np.save(tmp_path / "x.npy", matrix)
    whole = sweep(matrix, path=tmp_path / "whole")
    cache = {  # the processes after the first compile nothing
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    rng, partial, resumed = np.random.default_rng(2), [], []
    for which in ("", "_save"):
        ended = in_a_process(KILLED, tmp_path, which, 0, K, PANEL, **cache)
        assert ended.returncode == 0, ended.stderr
        for stop in rng.integers(1, int(ended.stdout), 3, endpoint=True):
            ended = in_a_process(KILLED, tmp_path, which, stop, K, PANEL, **cache)
            assert ended.returncode == -signal.SIGKILL, ended.stderr
            state = tmp_path / f"{which}-{stop}"
            cut = state.with_name(state.name + ".partial")
            partial.append(cut.stat().st_size if cut.exists() else None)
            again = sweep(matrix, path=state)
            resumed.append(again.resumed)
            assert again.scores.tobytes() == whole.scores.tobytes()
            assert again.indices.tobytes() == whole.indices.tobytes()
            assert state.read_bytes() == (tmp_path / "whole").read_bytes()
            assert not cut.exists()
    # The instants differ: some between bands, some with half of a file written.
    size = (tmp_path / "whole").stat().st_size
    assert len(set(resumed)) > 1
    assert any(written is not None and written < size for written in partial)


def test_a_full_disk_loses_nothing_finished(matrix, tmp_path):
    """The limit on a file's size stands for the disk's: the same failing write."""
    np.save(tmp_path / "x.npy", matrix)
    program = f"""
        import resource, numpy as np
        from jaxling import sweeps
        save = sweeps._save
        def limited(path, inputs, done, best):
            if done == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            save(path, inputs, done, best)
        sweeps._save = limited
        sweeps.sweep_neighbors(np.load({str(tmp_path / "x.npy")!r}), k={K},
            panel={PANEL}, progress=False, path={str(tmp_path / "state")!r})
    """
    ended = in_a_process(program)
    assert ended.returncode == 1
    message = ended.stderr.strip().splitlines()[-1]
    assert message.startswith("OSError: Cannot save the sweep in"), ended.stderr
    assert "File too large" in message and "still there" in message
    assert [file.name for file in tmp_path.glob("state*")] == ["state"]
    resumed = sweep(matrix, path=tmp_path / "state")
    assert resumed.resumed == 2
    assert resumed.indices.tobytes() == sweep(matrix).indices.tobytes()


def test_a_place_that_cannot_be_written_is_an_error(matrix, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/state"):
        sweep(matrix, path=tmp_path / "file" / "state")


@pytest.mark.parametrize(
    "n, mebibytes",
    [
        (24_000, 600),
        pytest.param(200_000, 1024, marks=pytest.mark.slow),
    ],
)
def test_anonymous_memory_of_a_mapped_matrix(tmp_path, n, mebibytes):
    """The rise after imports, watched from a thread through the whole sweep."""
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (n, 64))
    rng = np.random.default_rng(0)
    for start in range(0, n, 8_000):
        x[start : start + 8_000] = rng.standard_normal((8_000, 64), np.float32)
    x.flush()
    program = f"""
        import re, threading, time
        import jax, numpy as np
        from jaxling import sweeps
        def anonymous():
            with open("/proc/self/status") as file:
                return int(re.search(r"RssAnon:\\s+(\\d+)", file.read())[1]) / 1024
        jax.devices()
        before, most = anonymous(), [0.0]
        def watch():
            while True:
                most[0] = max(most[0], anonymous())
                time.sleep(0.01)
        threading.Thread(target=watch, daemon=True).start()
        matrix = np.load({str(tmp_path / "x.npy")!r}, mmap_mode="r")
        panel = min(sweeps.PANEL, len(matrix) // 3)
        found = sweeps.sweep_neighbors(matrix, k=50, panel=panel,
            path={str(tmp_path / "state")!r}, progress=False)
        assert (found.indices >= 0).all()
        print(most[0] - before)
    """
    ended = in_a_process(program)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < mebibytes
