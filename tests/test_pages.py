"""The browser page, in a real Chromium: what a reader sees, finds and walks to."""

import pathlib
import re
import subprocess
import sys
import textwrap
import time

import chromium
import numpy as np
import pytest

from jaxling.report import pages

needs_chromium = pytest.mark.skipif(
    chromium.PROGRAM is None, reason="no chromium on this machine"
)
READY = "document.documentElement.dataset.ready"
HOSTILE = [
    "<img src=x onerror=\"document.title='owned'\">",
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "$meta $data $policy",
    "&lt;b&amp;",
    "\u202eesrever",
    "line\nbreak",
    "\\u003c",
    '"quoted"',
    "\ud800",
    "",
    "\u200d",
]


def lists(rng, count, k, rows=None):
    """Neighbour lists with the places of some neighbours empty."""
    rows = count if rows is None else rows
    ids = rng.integers(0, count, (rows, k))
    distances = np.sort(rng.random((rows, k)), axis=1).astype(np.float32)
    ids[rng.random(rows) < 0.1, -2:] = -1
    distances[ids < 0] = np.nan
    return ids, distances


@pytest.fixture(scope="module")
def tab():
    with chromium.Page("--window-size=1100,900") as page:
        yield page


@pytest.fixture
def opened(tab, tmp_path):
    def open_page(*columns, **knobs):
        pages.save_browser(tmp_path / "browser.html", *columns, **knobs)
        tab.events.clear()
        tab.open(tmp_path / "browser.html")
        tab.until(READY)
        return tab

    return open_page


@pytest.mark.parametrize("size", [0, 1, 12, 13, 14, 25, 26, 70_000])
def test_text_holds_the_bytes(rng, size):
    content = rng.bytes(size)
    text = pages._text(content).replace("\n", "")
    assert re.fullmatch(r"[!-~]*", text) and not set(text) & set("<>&")
    digits = {chr(code): value for value, code in enumerate(pages._DIGITS)}
    values = [digits[a] + 91 * digits[b] for a, b in zip(text[::2], text[1::2])]
    bits = sum(value << 13 * i for i, value in enumerate(values[:200]))
    whole = bits.to_bytes(13 * 25 + 8, "little")[: min(size, 13 * 25)]
    assert whole == content[: 13 * 25]


@needs_chromium
@pytest.mark.parametrize("sampled", [False, True])
def test_the_page_holds_every_list(opened, rng, sampled):
    count, k = 70_000, 6
    rows = np.sort(rng.choice(count, 500, replace=False)) if sampled else None
    ids, distances = lists(rng, count, k, 500 if sampled else None)
    tokens = [f"t{i}" for i in range(count)]
    systems = np.array(["Latin", "Thai", "Common"])[np.arange(count) % 3]
    page = opened(
        tokens,
        systems,
        ids,
        distances,
        rows=rows,
        title="All",
        starts=[int(rows[0])] if sampled else [2],
    )
    lines = [0, 1, 499]
    owners = [int(rows[line]) for line in lines] if sampled else lines
    shown = page.run(
        f"{owners}.map(id => Array.from({{length: k}}, (_, i) =>"
        " neighbour(row(id) * k + i)))"
    )
    np.testing.assert_array_equal(shown, np.where(ids < 0, count, ids)[lines])
    far = np.array(page.run(f"{owners}.map(id => distances(row(id) * k))"))
    known = ids[lines] >= 0
    # Half a step of 0.01, and float32.
    assert np.abs(far - distances[lines])[known].max() < 0.0051
    occurrence = np.bincount(ids[ids >= 0], minlength=count)
    assert page.run("Array.from(listed.slice(0, 50))") == occurrence[:50].tolist()
    assert page.run("[...system.slice(0, 4)].map(i => meta.systems[i])") == [
        "Latin",
        "Thai",
        "Common",
        "Latin",
    ]
    assert page.complaints() == []


@needs_chromium
def test_search_choose_walk_and_go_back(opened, rng):
    tokens = [
        "▁king",
        "kingdom",
        "##king",
        "viking",
        "▁koning",
        "король",
        "ملك",
        "Ġking",
    ]
    systems = ["Latin"] * 5 + ["Cyrillic", "Arabic", "Latin"]
    ids = np.array([[5, 6, 1]] * 8)
    distances = np.array([[0.1, 0.25, 0.5]] * 8)
    page = opened(tokens, systems, ids, distances, title="Words", starts=[3])
    assert page.run("$('name').innerText") == "viking"
    page.run("$('query').focus()")
    page.type("KING")
    hits = "[...document.querySelectorAll('#hits .token')].map(n => n.innerText)"
    # The whole token first, then beginnings, then anywhere.
    assert page.run(hits) == ["▁king", "##king", "Ġking", "kingdom", "viking"]
    for key in ("ArrowDown", "ArrowUp", "Enter"):
        page.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    page.until("$('name').innerText === '▁king'")
    line = "[...document.querySelectorAll('#list li')].map(n => n.innerText)"
    assert [text.split() for text in page.run(line)] == [
        ["1", "король", "Cyrillic", "0.90"],
        ["2", "ملك", "Arabic", "0.75"],
        ["3", "kingdom", "Latin", "0.50"],
    ]
    assert page.run("$('facts').innerText").split("\n")[-1] == "0 tokens"
    page.run("document.querySelectorAll('#list button')[1].click()")
    page.until("$('name').innerText === 'ملك'")
    assert page.run("$('trail').innerText").split() == ["▁king", "›"]
    page.run("$('tab-in').click()")
    assert len(page.run(line)) == 8
    page.run("history.back()")
    page.until("$('name').innerText === '▁king'")
    page.run("$('query').value = '#4'; suggest()")
    assert page.run(hits) == ["▁koning"]
    page.run("$('query').value = 'zzz'; suggest()")
    assert page.run("$('hits').innerText") == "No token holds this."


@needs_chromium
def test_right_to_left_tokens_stay_in_their_place(opened):
    tokens = ["▁water", "▁ماء", "מים", "वाटर", "ि"]
    systems = ["Latin", "Arabic", "Hebrew", "Devanagari", "Devanagari"]
    ids, distances = np.array([[1, 2, 3, 4]] * 5), np.array([[0.1, 0.2, 0.3, 0.4]] * 5)
    page = opened(tokens, systems, ids, distances, title="Directions", starts=[0])
    lines = page.run(
        "[...document.querySelectorAll('#list button')].map(line => ["
        "  getComputedStyle(line.querySelector('.token')).direction,"
        "  getComputedStyle(line.querySelector('.token')).unicodeBidi,"
        "  ...[...line.children].map(part => part.getBoundingClientRect().x)])"
    )
    assert [line[0] for line in lines] == ["rtl", "rtl", "ltr", "ltr"]
    for line in lines:
        assert line[1].startswith("isolate")
        assert line[2:] == sorted(line[2:])  # rank, dot, token, system, bar, number
    assert page.run("document.querySelectorAll('#list .token')[3].innerText") == "◌ि"


@needs_chromium
def test_tokens_are_text_and_never_markup(opened, rng):
    ids, distances = lists(rng, len(HOSTILE), 3)
    title = "</title><script>document.title='owned'</script> $data"
    page = opened(
        HOSTILE, ["<b>"] * len(HOSTILE), ids, distances, title=title, starts=[0]
    )
    assert page.run("document.querySelectorAll('img, b').length") == 0
    assert page.run("document.querySelector('h1').innerText") == title
    for i, token in enumerate(HOSTILE):
        page.run(f"show({i})")
        shown = page.run("$('name').textContent")
        expected = {"line\nbreak": "line␊break", "\ud800": "?", "": "(empty)"}
        assert shown == expected.get(token, "U+200D" if token == "\u200d" else token)
    assert "owned" not in page.run("document.title")[:20]
    assert page.complaints() == []
    assert [url.split(":")[0] for url in page.requested()] == ["file"]


@needs_chromium
def test_the_policy_stops_a_foreign_script(opened, rng):
    ids, distances = lists(rng, 5, 2)
    page = opened(list("abcde"), ["Latin"] * 5, ids, distances, title="Policy")
    page.run(
        "document.head.append(Object.assign(document.createElement('script'),"
        " {textContent: 'window.owned = 1'}))"
    )
    assert page.run("window.owned === undefined")
    assert "Content Security Policy" in " ".join(page.complaints())


@needs_chromium
@pytest.mark.parametrize(
    "count, megabytes",
    [(25_000, 4), pytest.param(250_000, 40, marks=pytest.mark.slow)],
)
def test_size_and_the_first_search(tab, tmp_path, rng, count, megabytes):
    """Random ids and distances, which nothing compresses; 50 neighbours."""
    path = tmp_path / "browser.html"
    ids = rng.integers(0, count, (count, 50))
    distances = np.sort(rng.random((count, 50)), axis=1)
    tokens = [f"▁{value:x}" for value in rng.integers(1 << 40, size=count)]
    systems = rng.choice(["Latin", "Cyrillic", "Han", "Common"], count)
    pages.save_browser(path, tokens, systems, ids, distances, title="Large")
    assert path.stat().st_size <= megabytes * 1e6
    started = time.monotonic()
    tab.open(path)
    tab.until("document.querySelector('#query')?.disabled === false")
    tab.run("$('query').focus()")
    tab.type(tokens[-1][1:7])
    tab.until("document.querySelectorAll('#hits .token').length > 0")
    assert time.monotonic() - started < 3
    tab.until(READY)
    last = tab.run(
        f"Array.from({{length: 50}}, (_, i) => neighbour({count - 1} * k + i))"
    )
    assert last == ids[-1].tolist()


def test_lists_that_do_not_fit_are_refused(tmp_path, rng):
    ids, distances = lists(rng, 4, 2)
    tokens, systems = list("abcd"), ["Latin"] * 4
    for columns, rows in [
        ((tokens, systems[:3], ids, distances), None),
        ((tokens, systems, ids[:3], distances), None),
        ((tokens, systems, ids, distances), np.arange(3)),
    ]:
        with pytest.raises(ValueError, match="`ids`"):
            pages.save_browser(tmp_path / "x.html", *columns, rows=rows, title="x")


@needs_chromium
def test_more_writing_systems_than_a_byte_counts(opened, rng):
    names = [f"System {i:03d}" for i in range(300)]
    ids, distances = lists(rng, 300, 2)
    tokens = [f"t{i}" for i in range(300)]
    page = opened(tokens, names, ids, distances, title="Many", starts=[299])
    assert page.run("[...system].map(i => meta.systems[i])") == names
    assert "System 299" in page.run("$('facts').innerText")


def test_a_page_that_would_be_too_large_shows_fewer_neighbours(
    tmp_path, rng, monkeypatch
):
    count, path = 3000, tmp_path / "browser.html"
    ids = rng.integers(0, count, (count, 50))
    distances = np.sort(rng.random((count, 50)), axis=1)
    tokens = [f"{value:x}" for value in rng.integers(1 << 40, size=count)]
    columns = tokens, ["Latin"] * count, ids, distances
    monkeypatch.setattr(pages, "_LARGEST", 300_000)
    with pytest.warns(UserWarning, match=r"shows the \d+ nearest of 50, to stay below"):
        pages.save_browser(path, *columns, title="Much", about="Lists.")
    assert 150_000 < path.stat().st_size <= 300_000
    shown = re.search(
        r"Lists\. Shown: the (\d+) nearest of 50", path.read_text("utf-8")
    )
    assert shown and 10 < int(shown[1]) < 50
    before = path.read_bytes()
    monkeypatch.setattr(pages, "_LARGEST", 120_000)
    with pytest.raises(ValueError, match="no neighbour at all"):
        pages.save_browser(path, *columns, title="Much")
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_page_that_was_there(tmp_path):
    """The limit on a file's size stands for the disk's: the same failing write."""
    program = f"""
        import pathlib, resource
        import numpy as np
        from jaxling.report import pages
        def save(count):
            ids, far = np.zeros((count, 2), int), np.zeros((count, 2))
            pages.save_browser(pathlib.Path({str(tmp_path / "x.html")!r}),
                ["t"] * count, ["Latin"] * count, ids, far, title="x")
        save(2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        save(3)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parents[1],
    )
    assert "OSError: [Errno 27]" in ended.stderr, ended.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["x.html"]
    assert '"count": 2' in (tmp_path / "x.html").read_text("utf-8")


def test_without_chromium_the_tests_of_pages_fail_in_ci(tmp_path):
    """`.ci/run` sets the variable; elsewhere they are skipped."""
    root = pathlib.Path(__file__).parents[1]
    assert "export REQUIRE_CHROMIUM=1" in (root / ".ci" / "run").read_text("utf-8")
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(root / "tests")}
    for value, expected in (("1", 1), ("", 0)):
        ended = subprocess.run(
            [sys.executable, "-c", "import chromium"],
            env=environment | {"REQUIRE_CHROMIUM": value},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == expected, ended.stderr
    assert "there is no chromium" not in ended.stderr


def test_the_same_lists_give_the_same_bytes(tmp_path, rng):
    ids, distances = lists(rng, 50, 3)
    for name in ("a", "b"):
        pages.save_browser(
            tmp_path / name,
            [str(i) for i in range(50)],
            ["Common"] * 50,
            ids,
            distances,
            title="x",
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
