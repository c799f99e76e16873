"""Self-contained offline pages: one HTML file that needs no network and no server.

`save_browser` writes the page in which a reader searches a token and walks from
neighbour to neighbour. All its data travel inside the file, as text:

    bytes -> zlib -> 13 bits at a time -> two of 91 printable characters

(8,192 <= 91 * 91; the text is 1.23 times the bytes where base64 is 1.33). The ids of
the neighbours are three planes, all low bytes, then all middle ones, then all high
ones, which lets zlib spend 18 bits on an id below 250,000 even where the ids are
random. Distances are the gaps between one neighbour and the next, in small steps.
"""

import base64
import hashlib
import html
import json
import os
import pathlib
import re
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxling.report import colors

_DIGITS = np.array(
    [code for code in range(33, 127) if chr(code) not in "<>&"], np.uint8
)
_GROUP = 13  # bits in two digits
_WIDTH = 1 << 16  # characters in a line of the file
_LARGEST = 40_000_000  # bytes of a page
_FRAME = 100_000  # bytes of a template, with a margin
_STEPS = (0.01, 0.02, 0.04, 0.08)


def save_browser(
    path: pathlib.Path,
    tokens: Sequence[str],
    systems: Sequence[str],
    ids: np.ndarray,
    distances: np.ndarray,
    *,
    rows: np.ndarray | None = None,
    starts: Sequence[int] = (),
    title: str,
    about: str = "",
) -> None:
    """Writes the page that walks through neighbour lists.

    Tokens are untrusted text: they are compressed in the file and enter the page as
    text nodes; the page's policy lets nothing run but its own script, and nothing load.

    Args:
      path: the file to write.
      tokens: every token, in id order.
      systems: the writing system of each token, at most 65,536 different ones.
      ids: `[rows, k]` token ids of the neighbours, best first; -1 where there is none.
      distances: `[rows, k]` cosine distances, ascending; shown to 0.01. Where the page
        would pass 40 MB they are shown more coarsely, and then fewer neighbours of each
        token; the page and a warning say how many.
      rows: the token that each line of `ids` belongs to; line i to token i when None.
      starts: ids of tokens to start from.
      title: heading of the page.
      about: a sentence under the heading.

    Raises:
      ValueError: shapes or lengths disagree, there are too many writing systems, or
        even one neighbour of each token takes more than 40 MB.
      OSError: the file cannot be written. The one that was there is as it was.
    """
    count = len(tokens)
    if len(systems) != count or ids.shape != distances.shape:
        raise ValueError(
            f"`systems` and `ids` must fit {count} tokens and the shape of `distances`"
            f" {distances.shape}; got {len(systems)} and {ids.shape}."
        )
    lines = count if rows is None else len(rows)
    if len(ids) != lines or count >= 1 << 24:
        raise ValueError(
            f"`ids` must have a line for each of {lines} tokens, and tokens must be"
            f" fewer than {1 << 24}; got {len(ids)} lines."
        )
    names, index = np.unique(
        np.asarray(systems, object).astype(str), return_inverse=True
    )
    if len(names) > 1 << 16:
        raise ValueError(
            f"`systems` must name at most {1 << 16} writing systems; got {len(names)}."
        )
    meta: dict[str, Any] = {
        "title": title,
        "about": about,
        "count": count,
        "systems": names.tolist(),
        "colors": colors.script_colors(names.tolist()),
        "rows": None if rows is None else np.asarray(rows).tolist(),
        "starts": [int(start) for start in starts],
    }
    spelled = json.dumps(list(tokens), ensure_ascii=False).encode(errors="replace")
    width = "u1" if len(names) <= 256 else "<u2"
    packed = {
        "tokens": zlib.compress(spelled),
        "systems": zlib.compress(index.astype(width).tobytes()),
    }
    # 16 bits of the page hold 13 of the data; its frame, its title and its lines' ends
    # need some room beside them.
    room = _LARGEST * 65_000 // 65_536 - len(_json(meta)) - _FRAME
    room = room * _GROUP // 16 - sum(map(len, packed.values()))
    k, step, lists = _fitting(np.where(ids < 0, count, ids), distances, room)
    if k < ids.shape[1]:
        said = f"the {k} nearest of {ids.shape[1]}, to stay below 40 MB"
        warnings.warn(f"{path} shows {said}.", stacklevel=2)
        meta["about"] = f"{about} Shown: {said}.".strip()
    packed |= lists
    meta |= {
        "k": k,
        "step": step,
        "bytes": {name: len(content) for name, content in packed.items()},
    }
    fields = {
        "meta": _json(meta),
        "data": "\n".join(
            f'<script type="text/plain" id="{name}">{_text(content)}</script>'
            for name, content in packed.items()
        ),
    }
    _write(path, "browser.html", title, fields)


def _fitting(
    ids: np.ndarray, distances: np.ndarray, room: int
) -> tuple[int, float, dict[str, bytes]]:
    """Most neighbours and finest distances that take at most `room` bytes: how many of
    a token, the step of the distances, and both compressed."""
    most = ids.shape[1]
    k = most
    while k or not most:
        lists = {"ids": zlib.compress(_planes(ids[:, :k]))}
        for step in _STEPS:
            lists["gaps"] = zlib.compress(_gaps(distances[:, :k], step))
            size = sum(map(len, lists.values()))
            if size <= room:
                return k, step, lists
        if not most:
            break
        # Near what fits; a list less each time from there.
        k = min(k - 1, max(0, k * room // size))
    raise ValueError(
        f"A page of {len(ids)} lists stays below {_LARGEST / 1e6:.0f} MB with no"
        " neighbour at all; make one of some of the tokens."
    )


def save_trajectory(
    path: pathlib.Path,
    tokens: Sequence[str],
    inputs: Sequence[int],
    top_tokens: np.ndarray,
    top_probabilities: np.ndarray,
    *,
    layers: Sequence[str],
    targets: Sequence[int],
    ranks: np.ndarray,
    target_probabilities: np.ndarray,
    entropy: np.ndarray,
    kl: np.ndarray,
    lines: np.ndarray,
    masked: bool = False,
    title: str,
    about: str = "",
) -> None:
    """Writes the heat-map of a lens: layers by positions, with what each place says.

    Colour is the probability of the top token; pointing at a place, or walking there
    with the arrow keys, shows its best tokens, the target's rank, and the curves of the
    tokens that are top at any layer. Tokens are untrusted text, as in `save_browser`.

    Args:
      path: the file to write.
      tokens: every token, in id order.
      inputs: the token at each position, `[n]`.
      top_tokens, top_probabilities: `[layer, n, k]`, best first; -1 for none.
      layers: what each layer is called.
      targets: the token wanted at each position, -1 for none.
      ranks, target_probabilities: the target's, `[layer, n]`.
      entropy, kl: in nats, `[layer, n]`.
      lines: `[layer, n, layer]`: in layer l, the probability of layer m's top token.
      masked: a position is read at its own token, not after it.
      title: heading of the page.
      about: a sentence under the heading.

    Raises:
      ValueError: shapes disagree.
    """
    depth, n = len(layers), len(inputs)
    for name, array in (
        ("top_tokens", top_tokens[..., 0]),
        ("top_probabilities", top_probabilities[..., 0]),
        ("ranks", ranks),
        ("target_probabilities", target_probabilities),
        ("entropy", entropy),
        ("kl", kl),
        ("lines", lines[..., 0]),
    ):
        if array.shape != (depth, n):
            raise ValueError(
                f"`{name}` must begin with {depth} layers and {n} positions; got"
                f" {array.shape}."
            )
    curves = []
    for i in range(n):
        # In the order in which they become top, each token once.
        first = {
            int(token): m for m, token in reversed([*enumerate(top_tokens[:, i, 0])])
        }
        curves.append(
            [
                [token, _rounded(lines[:, i, m])]
                for token, m in sorted(first.items(), key=lambda item: item[1])
                if token >= 0
            ]
        )
    used = {*map(int, inputs), *map(int, targets), *map(int, top_tokens.ravel())} - {-1}
    data = {
        "about": about,
        "layers": list(layers),
        "inputs": [int(i) for i in inputs],
        "targets": [int(i) for i in targets],
        "top": [
            [
                [[int(t), _rounded(p)] for t, p in zip(ids, ps) if t >= 0]
                for ids, ps in zip(*row)
            ]
            for row in zip(top_tokens, top_probabilities)
        ],
        "ranks": np.asarray(ranks).tolist(),
        "target_probabilities": _rounded(target_probabilities),
        "entropy": _rounded(entropy),
        "kl": _rounded(kl),
        "lines": curves,
        "masked": masked,
        "vocabulary": len(tokens),
        "tokens": {i: tokens[i] if i < len(tokens) else "" for i in sorted(used)},
    }
    _write(path, "trajectory.html", title, {"data": _json(data)})


def _rounded(values: np.ndarray) -> list:
    """To what a page shows; a value that is no number is 0, as JSON has none such."""
    return np.round(np.nan_to_num(np.asarray(values, np.float64)), 5).tolist()


def _json(content: object) -> str:
    # Lone surrogates are kept as escapes, which JavaScript reads.
    return json.dumps(content).replace("<", "\\u003c")


def _write(path: pathlib.Path, name: str, title: str, fields: dict[str, str]) -> None:
    """Fills a template's `$fields`."""
    template = pathlib.Path(__file__).with_name(name).read_text("utf-8")
    title = html.escape(title)
    fields = {"policy": _policy(template), "title": title, "heading": title} | fields
    # One pass, so that nothing in a title or a token can name another field.
    pieces = re.split(rf"\$({'|'.join(fields)})\b", template)
    pieces[1::2] = [fields[name] for name in pieces[1::2]]
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write("".join(pieces))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _planes(ids: np.ndarray) -> bytes:
    """The low, the middle and the high byte of every id, one plane after another."""
    return b"".join(
        (ids >> shift & 255).astype(np.uint8).tobytes() for shift in (0, 8, 16)
    )


def _gaps(distances: np.ndarray, step: float) -> bytes:
    """Each line's first distance and the growth from each to the next, in steps."""
    steps = np.rint(np.nan_to_num(distances, nan=0.0) / step).astype(np.int32)
    steps = np.maximum.accumulate(np.clip(steps, 0, 255), axis=1)
    return np.diff(steps, axis=1, prepend=0).astype(np.uint8).tobytes()


def _text(content: bytes) -> str:
    """`content` as printable ASCII: 13 bits become two digits of base 91, low first."""
    padded = np.frombuffer(content + bytes(-len(content) % _GROUP), np.uint8)
    octets = padded.reshape(-1, _GROUP).T.astype(np.uint32)  # [13, rows of 8 groups]
    digits = np.empty((octets.shape[1], 8, 2), np.uint8)
    for group in range(8):
        at, shift = divmod(group * _GROUP, 8)
        value = octets[at] >> shift | octets[at + 1] << 8 - shift
        if 16 - shift < _GROUP:
            value |= octets[at + 2] << 16 - shift
        digits[:, group, 1], digits[:, group, 0] = np.divmod(value & 8191, 91)
    text = _DIGITS[digits.ravel()].tobytes().decode("ascii")
    return "\n".join(text[at : at + _WIDTH] for at in range(0, len(text), _WIDTH))


def _policy(template: str) -> str:
    """Nothing loads; the page's own script and style run, known by their hashes."""
    rules = ["default-src 'none'"]
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        rules.append(f"{tag}-src 'sha256-{digest}'")
    return "; ".join(rules)
