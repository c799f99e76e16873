"""Pictures: right in every script, equal to the byte, and clear about bad input."""

import subprocess
import sys
import textwrap
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib import image

from jaxling.report import colors, fonts, plots

WORDS = ["слово", "日本語", "العربية", "हिन्दी", "ไทย", "$x_1$"]


def held_by_this_machine() -> list[str]:
    return [word for word in WORDS if not fonts.fonts_for(word)[1]]


def draw_all(folder, rng):
    labels = held_by_this_machine()
    size = len(labels)
    assert size >= 2  # DejaVu Sans, which comes with matplotlib, holds the first
    plots.save_bars(folder / "bars.png", labels, rng.random(size), reference=0.5)
    plots.save_bars(
        folder / "groups.png",
        labels,
        np.array([rng.random(size), np.full(size, np.nan)]),
        series=["one", "two"],
        errors=np.full((2, size), 0.1),
    )
    plots.save_heatmap(
        folder / "heat.png",
        labels,
        labels,
        np.where(np.eye(size), np.nan, rng.random((size, size)) * 30),
        row_label="token",
        intervals=(np.zeros((size, size)), np.full((size, size), 30.0)),
    )
    plots.save_heatmap(
        folder / "large.png",
        [f"{i}" for i in range(40)],
        labels,
        rng.normal(size=(40, size)),
        diverging=True,
    )
    plots.save_histogram(
        folder / "whole.png", ["a", "b"], [rng.poisson(3, 99), rng.poisson(9, 99)]
    )
    plots.save_histogram(folder / "real.png", ["a"], [rng.normal(size=99)])
    plots.save_curves(
        folder / "curves.png",
        labels,
        rng.random((size, 12)),
        errors=np.ones((size, 12)),
    )
    plots.save_panels(
        folder / "points.png",
        labels,
        ["first", labels[0]],
        rng.random((2, size)),
        np.stack([np.full(size, np.nan), rng.random(size)]),
        references=[None, 0.5],
    )
    names = rng.choice([*labels, "Latin", "Han"], 500).tolist()
    plots.save_fits(
        folder / "panels.png",
        [*labels, "last"],
        [rng.normal(size=(9, 2)) for _ in range(size + 1)],
        [rng.choice(["a", "b"], 9).tolist() for _ in range(size + 1)],
        title=labels[0],
        x_label="x",
        y_label="y",
    )
    plots.save_scatter(folder / "scatter.png", names, rng.normal(size=(500, 2)), most=3)
    plots.save_scatter(
        folder / "words.png", labels, rng.normal(size=(size, 2)), texts=labels
    )


def test_every_picture_is_drawn_without_a_warning(tmp_path, rng):
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning of matplotlib
        draw_all(tmp_path, rng)
    assert dict(matplotlib.rcParams) == before
    pictures = sorted(tmp_path.iterdir())
    assert len(pictures) == 11
    for path in pictures:
        pixels = image.imread(path)[..., :3]
        assert pixels.shape[0] > 150 and pixels.shape[1] > 400, path
        inked = (pixels.min(axis=-1) < 0.9).mean()
        assert 0.005 < inked < 0.95, path


def test_the_same_input_gives_the_same_bytes(tmp_path):
    program = textwrap.dedent(
        """
        import sys
        from jaxling.report import plots
        plots.save_bars(sys.argv[1], ["a", "b"], [1.0, 2.0], title=sys.argv[2])
        """
    )
    for name, title in [("a", "x"), ("b", "x"), ("c", "y")]:
        command = [sys.executable, "-c", program, tmp_path / name, title]
        subprocess.run(command, check=True)
    first, second, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second != other


def test_nothing_to_show_is_shown_as_nothing(tmp_path):
    plots.save_bars(tmp_path / "a.png", [], [])
    plots.save_heatmap(tmp_path / "b.png", [], [], np.zeros((0, 0)))
    plots.save_histogram(tmp_path / "c.png", ["a"], [np.zeros(0)])
    plots.save_curves(tmp_path / "d.png", [], [])
    plots.save_scatter(tmp_path / "e.png", [], np.zeros((0, 2)))
    plots.save_fits(tmp_path / "f.png", [], [], [])
    nothing, flat = np.full((1, 2), np.nan), np.ones((3, 2))
    plots.save_fits(
        tmp_path / "g.png", ["a", "b"], [nothing, flat], [["x"], ["x", "y", "y"]]
    )
    assert len(list(tmp_path.iterdir())) == 7


def test_a_character_no_font_holds_is_named_once(tmp_path):
    with pytest.warns(UserWarning) as caught:
        plots.save_bars(tmp_path / "a.png", ["a\u0378", "b\ue000\u0378"], [1, 2])
    assert len(caught) == 1
    assert "holds 2 characters" in str(caught[0].message)
    assert "U+0378 U+E000" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_joiners_need_no_glyph(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.save_bars(tmp_path / "a.png", ["a\u200db\u2068"], [1])


def test_fonts_are_few_and_enough():
    assert fonts.fonts_for("plain text") == (["DejaVu Sans"], set())
    families, missing = fonts.fonts_for("".join(WORDS))
    for character in set("".join(WORDS)) - missing:
        assert any(ord(character) in fonts._held(family) for family in families)
    assert fonts.fonts_for("\u0378")[1] == {"\u0378"}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: plots.save_bars(p, ["a"], [1, 2]), r"\(1, 1\).*\(1, 2\)"),
        (lambda p: plots.save_heatmap(p, ["a"], ["b"], np.ones((2, 1))), r"\(2, 1\)"),
        (lambda p: plots.save_histogram(p, ["a"], []), "1 labels; got 0"),
        (lambda p: plots.save_fits(p, ["a"], [], []), "got 1, 0 and 0"),
        (lambda p: plots.save_panels(p, ["a"], ["b"], [[1]], [[1, 2]]), r"\(1, 2\)"),
        (lambda p: plots.save_curves(p, ["a"], np.ones((2, 3))), "1 labels; got 2"),
        (lambda p: plots.save_curves(p, ["a"], [[1, 2]], x=[1]), "length of `x`"),
        (lambda p: plots.save_scatter(p, ["a"], np.ones((1, 3))), r"\(1, 3\)"),
    ],
)
def test_shapes_are_checked_before_drawing(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_writing_system_has_one_colour_everywhere():
    assert colors.script_colors(["Latin", "CJK"]) == colors.script_colors(
        ["LATIN", "Han"]
    )
    several = colors.script_colors(["Latin", "Cyrillic", "Tibetan", "Runic", "Han"])
    assert len(set(several)) == 5
    assert all(len(color) == 7 and int(color[1:], 16) >= 0 for color in several)


def test_a_band_may_have_two_widths(tmp_path):
    row, width = np.array([0.2, 0.5, 0.4]), np.array([0.1, 0.2, 0.1])
    pictures = []
    for errors in (width, np.stack([width, width]), np.stack([0 * width, width])):
        plots.save_curves(tmp_path / "curve.png", ["a"], [row], errors=[errors])
        pictures.append((tmp_path / "curve.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
