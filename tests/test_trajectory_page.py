"""The page of a lens, in a real Chromium."""

import json
import re

import chromium
import numpy as np
import pytest

from jaxling.report import pages

needs_chromium = pytest.mark.skipif(
    chromium.PROGRAM is None, reason="no chromium on this machine"
)
HOSTILE = [
    "<img src=x onerror=\"document.title='owned'\">",
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "$data $policy",
    "▁\u0634\u0645\u0633",
    "\u202eesrever",
    "\ud800",
    "",
    "▁dog",
]


def trajectory(rng, depth=4, n=6, k=3):
    """Three best tokens of every place, and what the page shows about them."""
    count = len(HOSTILE)
    top = np.stack(
        [[rng.permutation(count)[:k] for _ in range(n)] for _ in range(depth)]
    )
    p = np.sort(rng.dirichlet(np.ones(k), (depth, n)))[..., ::-1]
    scalars = rng.random((depth, n))
    return dict(
        tokens=HOSTILE,
        inputs=rng.integers(0, count, n),
        top_tokens=top,
        top_probabilities=p,
        layers=[str(i) for i in range(depth)],
        targets=np.array([*top[0, :-1, 0], -1]),
        ranks=rng.integers(0, count, (depth, n)),
        target_probabilities=scalars,
        entropy=scalars,
        kl=scalars,
        lines=rng.random((depth, n, depth)),
        title="<b>A lens",
        about="</script>",
    )


@needs_chromium
def test_a_reader_sees_every_place_and_nothing_runs(rng, tmp_path):
    given = trajectory(rng)
    pages.save_trajectory(tmp_path / "lens.html", **given)
    with chromium.Page("--window-size=1100,900") as page:
        page.open(tmp_path / "lens.html")
        page.until("document.documentElement.dataset.ready")
        assert page.run("document.title") == "<b>A lens"
        assert page.run("document.querySelectorAll('td').length") == 24
        # The last layer stands on top; its last position is chosen at first.
        assert page.run("document.querySelector('tbody th').textContent") == "3"
        best = HOSTILE[given["top_tokens"][3, 5, 0]]
        shown = page.run("document.querySelector('#top .token').textContent")
        expected = best.encode("utf-8", "replace").decode() if best else "(empty)"
        assert shown in (best, expected, "\ufffd")
        page.run(
            "document.querySelectorAll('tbody tr')[3].cells[1]"
            ".dispatchEvent(new PointerEvent('pointerenter'))"
        )
        assert page.run("document.getElementById('place').textContent").startswith(
            "Layer 0"
        )
        facts = page.run("document.getElementById('facts').textContent")
        assert f"{given['ranks'][0, 0] + 1} of 9" in facts
        # In the first layer its own top token is the target of all but the last place.
        assert page.run("document.querySelectorAll('td.hit').length") >= 5
        lines = page.run("document.querySelectorAll('#legend li').length")
        assert lines == len(set(given["top_tokens"][:, 0, 0]))
        page.run("document.getElementById('map').focus()")
        page.run(
            "document.getElementById('map').dispatchEvent("
            "new KeyboardEvent('keydown', {key: 'ArrowUp'}))"
        )
        assert page.run("document.getElementById('place').textContent").startswith(
            "Layer 1"
        )
        assert not page.complaints()
        assert all(url.startswith("file:") for url in page.requested())


def test_numbers_and_tokens_are_in_the_file(rng, tmp_path):
    given = trajectory(rng)
    pages.save_trajectory(tmp_path / "lens.html", **given)
    text = (tmp_path / "lens.html").read_text("utf-8")
    found = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    data = json.loads(found[1])
    assert data["inputs"] == given["inputs"].tolist()
    top = [[place[0][0] for place in row] for row in data["top"]]
    np.testing.assert_array_equal(top, given["top_tokens"][..., 0])
    np.testing.assert_allclose(data["kl"], given["kl"], atol=1e-5)
    for token, ps in data["lines"][2]:
        layer = list(given["top_tokens"][:, 2, 0]).index(token)
        np.testing.assert_allclose(ps, given["lines"][:, 2, layer], atol=1e-5)


def test_shapes_that_disagree_are_named(rng, tmp_path):
    given = trajectory(rng) | {"kl": np.zeros((4, 5))}
    with pytest.raises(ValueError, match="`kl` must begin with 4 layers and 6"):
        pages.save_trajectory(tmp_path / "lens.html", **given)
