"""Pictures: one call each, with a path, labels and values.

Text may be in any script: fonts that hold its characters are looked for among those of
the machine, and a character that none of them holds is written as `<U+XXXX>`, with one
warning. Shaping and direction are matplotlib's. The same input gives the same bytes.
"""

import contextlib
import os
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import figure, rcsetup

from jaxling.report import colors, fonts, tables

_INK, _SOFT = "#202124", "#6b7785"
_CYCLE = ["#3b6fb6", "#c0392b", "#2e8b57", "#e0a100", "#7a4fbf", "#17a2b8"]
_CYCLE += ["#d6308c", "#8d5524", "#8bc34a", "#5f6368"]
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _SOFT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": _INK,
    "axes.prop_cycle": rcsetup.cycler(color=_CYCLE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "font.size": 9.5,
    "grid.color": "#e6e8ea",
    "legend.frameon": False,
    "text.color": _INK,
    "text.parse_math": False,  # tokens hold dollar signs
    "xtick.color": _SOFT,
    "xtick.labelcolor": _INK,
    "ytick.color": _SOFT,
    "ytick.labelcolor": _INK,
}
Path = str | os.PathLike[str]


def save_bars(
    path: Path,
    labels: Sequence[str],
    values: np.ndarray | Sequence[float] | Sequence[Sequence[float]],
    *,
    series: Sequence[str] = (),
    errors: np.ndarray | None = None,
    title: str = "",
    value_label: str = "",
    value_format: str = "{:.3g}",
    reference: float | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """Horizontal bars, the first label on top, each with its value written out.

    `values` is `[labels]`, or `[series, labels]` for groups of bars; `errors` has the
    same shape, or is two of it, below and above. `reference` draws a dashed line
    (chance, a paper's number).
    """
    values = np.asarray(values, dtype=float)
    if errors is not None:
        errors = np.asarray(errors, dtype=float)
        errors = np.broadcast_to(errors, (2, *values.shape)).reshape(
            2, *np.atleast_2d(values).shape
        )
    values = np.atleast_2d(values)
    if values.shape != (max(len(series), 1), len(labels)):
        raise ValueError(
            f"`values` must be {(max(len(series), 1), len(labels))}, a number for each"
            f" of the series and labels; got {values.shape}."
        )
    height = 1.0 + len(labels) * max(0.26, 0.17 * len(values))
    with _picture(path, [*labels, *series, title, value_label], (7.2, height)) as (
        axes,
        shown,
    ):
        place = np.arange(len(labels))
        thickness = 0.78 / len(values)
        for i, row in enumerate(values):
            at = place + (i - (len(values) - 1) / 2) * thickness
            error = None if errors is None else np.nan_to_num(errors[:, i]).clip(0)
            if error is not None and not error.any():
                error = None  # no caps, which would look like a narrow interval
            bars = axes.barh(
                at,
                np.nan_to_num(row),
                thickness * 0.92,
                xerr=error,
                color=_CYCLE[i % len(_CYCLE)],
                error_kw={"ecolor": _INK, "elinewidth": 0.9, "capsize": 2},
                label=shown(series[i]) if series else None,
            )
            texts = ["–" if np.isnan(v) else value_format.format(v) for v in row]
            axes.bar_label(bars, texts, padding=3, fontsize=8, color=_SOFT)
        axes.set_yticks(place, [shown(label) for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.09)
        if limits:
            axes.set_xlim(*limits)
        elif len(labels) and np.nanmin(values, initial=0) >= 0:
            axes.set_xlim(left=0)
        if reference is not None:
            axes.axvline(reference, color=_INK, linestyle="--", linewidth=0.9)
        _name(axes, shown, title, value_label, "")
        if series:
            _legend(axes)


def save_panels(
    path: Path,
    labels: Sequence[str],
    panels: Sequence[str],
    values: np.ndarray,
    errors: np.ndarray,
    *,
    title: str = "",
    references: Sequence[float | None] = (),
) -> None:
    """Points with error bars, the first label on top, one panel for each quantity.

    `values` and `errors` are `[panel, label]`, errors half the width of the bars (NaN:
    none); `references` draws a dashed line in each panel.
    """
    values, errors = (np.asarray(x, dtype=float) for x in (values, errors))
    if not values.shape == errors.shape == (len(panels), len(labels)):
        raise ValueError(
            f"`values` and `errors` must be {(len(panels), len(labels))}, a number for"
            f" each panel and label; got {values.shape} and {errors.shape}."
        )
    size = (2.0 + 2.6 * len(panels), 1.3 + 0.42 * len(labels))
    with _picture(path, [*labels, *panels, title], size, (1, len(panels)), "y") as (
        grid,
        shown,
    ):
        place = np.arange(len(labels))
        for i, axes in enumerate(grid):
            for at in place:
                color = _CYCLE[at % len(_CYCLE)]
                axes.errorbar(
                    values[i, at],
                    at,
                    xerr=np.nan_to_num(errors[i, at]),
                    fmt="o",
                    color=color,
                    markersize=6,
                    elinewidth=1.6,
                    capsize=3,
                )
            if references and references[i] is not None:
                axes.axvline(references[i], color=_INK, linestyle="--", linewidth=0.9)
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.margins(x=0.12)
            axes.locator_params(axis="x", nbins=4)
            axes.set_title(shown(panels[i], 60), fontsize=10)
        grid[0].set_yticks(place, [shown(label) for label in labels])
        grid[0].set_ylim(len(labels) - 0.5, -0.5)
        grid[0].figure.suptitle(
            shown(title, 120), x=0.01, ha="left", fontsize=12, fontweight="bold"
        )


def save_heatmap(
    path: Path,
    rows: Sequence[str],
    columns: Sequence[str],
    values: np.ndarray,
    *,
    title: str = "",
    row_label: str = "",
    column_label: str = "",
    value_label: str = "",
    value_format: str = "{:.2f}",
    limits: tuple[float, float] | None = None,
    diverging: bool = False,
    intervals: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """A matrix `[rows, columns]` as colours, with its numbers where they fit.

    NaN is left grey. `diverging` centres the colours on zero. `intervals` are the lower
    and the upper ends, matrices too, written below the numbers.
    """
    values = np.asarray(values, dtype=float)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(
            f"`values` must be {(len(rows), len(columns))}, rows by columns; got"
            f" {values.shape}."
        )
    known = values[np.isfinite(values)]
    low, high = limits or (known.min(initial=0), known.max(initial=0))
    if diverging and not limits:
        low, high = -max(-low, high), max(-low, high)
    written = max(values.shape) <= 24
    cell = (0.68 if intervals else 0.46) if written else 0.22
    longest = max([len(str(row)) for row in rows], default=0)
    wide = 2.2 + 0.075 * min(longest, 40) + cell * len(columns)
    size = (
        min(max(wide, 2.0 + 0.1 * len(title)), 24),
        min(1.5 + max(cell * 0.8, 0.2) * len(rows), 24),
    )
    text = [*rows, *columns, title, row_label, column_label, value_label]
    with _picture(path, text, size) as (axes, shown):
        palette = matplotlib.colormaps["RdBu_r" if diverging else "YlGnBu"]
        image = axes.imshow(
            np.ma.masked_invalid(values if values.size else [[np.nan]]),
            cmap=palette.with_extremes(bad="#c9cdd1"),
            vmin=low,
            vmax=high if high > low else low + 1,
            aspect="auto",
            interpolation="nearest",
        )
        if written:
            for (i, j), value in np.ndenumerate(values):
                if np.isfinite(value):
                    red, green, blue, _ = image.cmap(image.norm(value))
                    lines = [value_format.format(value)]
                    if intervals:
                        ends = [value_format.format(end[i, j]) for end in intervals]
                        lines.append("–".join(ends))
                    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                    axes.text(
                        j,
                        i,
                        "\n".join(lines),
                        ha="center",
                        va="center",
                        fontsize=6.5 if intervals else 7.5,
                        color="white" if dark else _INK,
                    )
        axes.set_xticks(range(len(columns)), [shown(name) for name in columns])
        axes.set_yticks(range(len(rows)), [shown(name) for name in rows])
        if len(columns) > 3:
            axes.tick_params(axis="x", rotation=90)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.figure.colorbar(
            image, ax=axes, label=shown(value_label), fraction=0.04, pad=0.02
        ).outline.set_visible(False)
        _name(axes, shown, title, column_label, row_label)


def save_histogram(
    path: Path,
    labels: Sequence[str],
    values: Sequence[np.ndarray],
    *,
    bins: int = 40,
    title: str = "",
    value_label: str = "",
    count_label: str = "count",
) -> None:
    """How often values occur, one series per label, drawn over each other.

    Whole numbers in a small range get a bar each; others are put into `bins`.
    """
    series = [np.asarray(row).ravel() for row in values]
    series = [row[np.isfinite(row)] for row in series]
    if len(series) != len(labels):
        raise ValueError(
            f"`values` must hold a series for each of {len(labels)} labels; got"
            f" {len(series)}."
        )
    everything = np.concatenate([*series, np.zeros(0)])
    low, high = everything.min(initial=np.inf), everything.max(initial=-np.inf)
    whole = all(np.issubdtype(row.dtype, np.integer) for row in series)
    if not everything.size:
        edges = np.array([0.0, 1.0])
    elif whole and high - low < 120:
        edges = np.arange(low, high + 2) - 0.5
    else:
        edges = np.histogram_bin_edges(everything, bins=bins)
    text = [*labels, title, value_label, count_label]
    with _picture(path, text, (7.2, 4.2)) as (axes, shown):
        for i, (label, row) in enumerate(zip(labels, series)):
            counts, _ = np.histogram(row, bins=edges)
            axes.stairs(
                counts,
                edges,
                fill=True,
                alpha=0.85 if len(series) == 1 else 0.5,
                color=_CYCLE[i % len(_CYCLE)],
                label=shown(label),
            )
        axes.grid(visible=False, axis="x")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=whole)
        _name(axes, shown, title, value_label, count_label)
        if len(labels) > 1:
            _legend(axes)


def save_curves(
    path: Path,
    labels: Sequence[str],
    values: Sequence[np.ndarray] | Sequence[Sequence[float]] | np.ndarray,
    *,
    x: np.ndarray | Sequence[float] | None = None,
    errors: Sequence[np.ndarray] | np.ndarray | None = None,
    title: str = "",
    x_label: str = "",
    value_label: str = "",
    reference: float | None = None,
    limits: tuple[float, float] | None = None,
    scale: str = "linear",
) -> None:
    """One line per label over a common axis `x` (0, 1, 2, ... when None).

    `errors` draws a band of that half-width around each line, or of those two widths
    below and above it. `scale` is `linear` or `log` and concerns the values.
    """
    rows = [np.asarray(row, dtype=float) for row in values]
    if len(rows) != len(labels):
        raise ValueError(
            f"`values` must hold a row for each of {len(labels)} labels; got"
            f" {len(rows)}."
        )
    longest = max((len(row) for row in rows), default=0)
    along = np.arange(longest) if x is None else np.asarray(x)
    if x is not None and any(len(row) != len(along) for row in rows):
        raise ValueError(
            f"Each row of `values` must have the length of `x`, {len(along)}; got"
            f" {[len(row) for row in rows]}."
        )
    text = [*labels, title, x_label, value_label]
    with _picture(path, text, (7.2, 4.4)) as (axes, shown):
        for i, (label, row) in enumerate(zip(labels, rows)):
            color = _CYCLE[i % len(_CYCLE)]
            dash = ("-", "--", ":", "-.")[i // len(_CYCLE) % 4]
            axes.plot(
                along[: len(row)],
                row,
                color=color,
                linestyle=dash,
                marker="o" if len(row) <= 40 else None,
                markersize=3,
                linewidth=1.6,
                label=shown(label),
            )
            if errors is not None:
                below, above = np.broadcast_to(errors[i], (2, len(row)))
                axes.fill_between(
                    along[: len(row)],
                    row - below,
                    row + above,
                    color=color,
                    alpha=0.15,
                    linewidth=0,
                )
        axes.set_yscale(scale)
        if limits:
            axes.set_ylim(*limits)
        if np.issubdtype(along.dtype, np.integer):
            axes.xaxis.get_major_locator().set_params(integer=True)
        if reference is not None:
            axes.axhline(reference, color=_INK, linestyle="--", linewidth=0.9)
        _name(axes, shown, title, x_label, value_label)
        if len(labels) > 1:
            _legend(axes)


def save_scatter(
    path: Path,
    labels: Sequence[str],
    points: np.ndarray,
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    alpha: float = 0.3,
    size: float | None = None,
    most: int = 20,
    texts: Sequence[str] | None = None,
) -> None:
    """Points `[n, 2]` coloured by the label of each; writing systems keep their colour.

    The `most` frequent labels are in the legend, the others are drawn in light grey
    below them. `texts` writes a word at each point, for few points.
    """
    points = np.asarray(points, dtype=float)
    if points.shape != (len(labels), 2):
        raise ValueError(
            f"`points` must be {(len(labels), 2)}, two coordinates for each label; got"
            f" {points.shape}."
        )
    names, code, count = np.unique(
        np.asarray(labels, dtype=object).astype(str),
        return_inverse=True,
        return_counts=True,
    )
    ranking = np.argsort(-count, kind="stable")
    shades = dict(zip(names, colors.script_colors(names.tolist())))
    size = size or float(np.clip(60_000 / max(len(points), 1), 1.5, 28))
    text = [*names, title, x_label, y_label, *(texts or ())]
    with _picture(path, text, (8.2, 6.4)) as (axes, shown):
        layers = [*ranking[most:], *ranking[:most]]
        for depth, kind in enumerate(layers):
            mine = points[code == kind]
            named = depth >= len(layers) - most
            axes.scatter(
                *mine.T,
                s=size,
                c=shades[names[kind]] if named else "#dfe2e5",
                alpha=alpha,
                linewidths=0,
                label=f"{shown(names[kind])}  {count[kind]:,}" if named else None,
                rasterized=True,
            )
        for point, word in zip(points, texts or ()):
            axes.annotate(
                shown(word),
                point,
                xytext=(3, 2),
                textcoords="offset points",
                fontsize=7,
            )
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.set_yticks([])
        _name(axes, shown, title, x_label, y_label)
        legend = _legend(axes)
        for handle in legend.legend_handles if legend else ():
            handle.set_alpha(1)
            handle.set_sizes([28])


def save_fits(
    path: Path,
    names: Sequence[str],
    points: Sequence[np.ndarray],
    labels: Sequence[Sequence[str]],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    columns: int = 5,
) -> None:
    """Small scatters side by side, each with its least-squares line.

    All have one horizontal axis, and each its own vertical one. Panel i has the points
    `points[i]` `[n, 2]`, coloured by `labels[i]`. Points that are not finite are left
    out; a line needs two different x.
    """
    if not len(names) == len(points) == len(labels):
        raise ValueError(
            f"Every panel needs a name, points and labels; got {len(names)},"
            f" {len(points)} and {len(labels)}."
        )
    kinds = sorted({label for row in labels for label in row})
    columns = max(1, min(columns, len(names)))
    lines = max(1, -(-len(names) // columns))
    size = (1.0 + 2.4 * columns, 1.2 + 1.8 * lines)
    text = [*names, *kinds, title, x_label, y_label]
    with _picture(path, text, size, (lines, columns)) as (grid, shown):
        for axes in grid[len(names) :]:
            axes.set_axis_off()
        for axes, name, places, called in zip(grid, names, points, labels):
            own = np.asarray(places, float).reshape(-1, 2)
            kind = np.asarray(called, str)
            known = np.isfinite(own).all(1)
            for i, label in enumerate(kinds):
                mine = own[known & (kind == label)]
                color = _CYCLE[i % len(_CYCLE)]
                axes.scatter(*mine.T, s=12, c=color, alpha=0.7, linewidths=0)
            x, y = own[known].T
            if len(np.unique(x)) > 1:
                slope, offset = np.polyfit(x, y, 1)
                ends = np.array([x.min(), x.max()])
                axes.plot(ends, slope * ends + offset, color=_INK, linewidth=0.9)
            axes.set_title(shown(name), fontsize=8.5, weight="normal")
            axes.tick_params(labelsize=7.5)
        drawing = grid[0].figure
        drawing.suptitle(shown(title, 120), x=0.01, ha="left", weight="bold")
        drawing.supxlabel(shown(x_label, 120), fontsize=9.5)
        drawing.supylabel(shown(y_label, 80), fontsize=9.5)
        handles = [
            grid[0].scatter([], [], s=18, c=_CYCLE[i % len(_CYCLE)], label=shown(kind))
            for i, kind in enumerate(kinds)
        ]
        drawing.legend(handles=handles, loc="outside right upper", fontsize=8.5)


def _name(axes, shown, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(shown(title, 120))
    axes.set_xlabel(shown(x_label, 120))
    axes.set_ylabel(shown(y_label, 80))


def _legend(axes):
    if axes.get_legend_handles_labels()[1]:
        return axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8.5)
    return None


@contextlib.contextmanager
def _picture(
    path: Path,
    text: Iterable[str],
    size: tuple[float, float],
    panels: tuple[int, int] | None = None,
    shared: str = "x",
) -> Iterator:
    """Axes of a new figure that is saved at the end, and the way to write its text.

    With `panels` (rows, columns) a flat array of so many axes, of which all share the
    one that `shared` names.
    """
    families, missing = fonts.fonts_for("".join(map(str, text)))
    lost = {c for c in missing if unicodedata.category(c) != "Cf"}
    if lost:
        listed = " ".join(f"U+{ord(c):04X}" for c in sorted(lost)[:12])
        warnings.warn(
            f"No font of this machine holds {len(lost)} characters of the picture"
            f" {os.fspath(path)} ({listed}); they are written as code points. Noto"
            " fonts hold most: https://fonts.google.com/noto.",
            stacklevel=4,
        )
    table = {ord(c): f"<U+{ord(c):04X}>" if c in lost else "" for c in missing}

    def shown(words: object, width: int = 40) -> str:
        return tables.shorten(str(words).translate(table), width)

    with matplotlib.rc_context({**_STYLE, "font.family": families}):
        drawing = figure.Figure(figsize=size)
        if panels is None:
            yield drawing.add_subplot(), shown
        else:
            common: Any = {f"share{shared}": True}
            yield drawing.subplots(*panels, squeeze=False, **common).ravel(), shown
        drawing.savefig(path, format="png", metadata={"Software": None})
