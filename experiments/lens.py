"""What would every layer say at every position of a text?

    python -m experiments.lens --model=bigscience/bloom-560m \
        --text="Français: chien - Deutsch:" --target=" Hund" --workdir=runs/lens

Default: the demo model reads a word-translation prompt, English to Swahili, whose
answer its training words do not hold; half a minute on 2 CPU cores.

Expect: at the answer's place the first layer gives Swahili's tokens between 4% and 18%,
the last between 28% and 62%; the answer itself is 57th of 12,288 after the first layer
and 32nd after the last, and "▁wa" is the top one at all four.

The logit lens (nostalgebraist, 2020): each layer's residual stream is read through the
final norm and the unembedding. `--tuned_lens=DIR` reads it behind the translators in
DIR (Belrose et al., 2023, https://arxiv.org/abs/2303.08112); they are trained on
`--train_text` and saved there first if DIR does not exist. A masked language model is
read at each token itself. Of an encoder-decoder the decoder is read (`--text` goes
into the encoder, `--decoder_text` into the decoder); `--stack=encoder` reads the
encoder through the shared embedding, which it was never trained for; in a line of
`--train_text` a tab parts what the two read, and without one both read it all.

`lens.html` is the map, `trajectory.parquet` its numbers. `tokens.png` has, at
`--position`, the tokens that were top at any layer; `languages.png` and `scripts.png`
the probability of each language's and writing system's tokens. A language's tokens are
those of its words in --lexicon. A token of several languages counts for none of them in
the lower bound, the line, and for each in the upper one, the upper end of its band.
"""

import pathlib

import numpy as np
import tqdm
from absl import flags, logging

from jaxling import (
    demo,
    lens,
    models,
    vocabulary,
    word_translation,
    writing_systems,
)
from jaxling.models import encoder, encoder_decoder
from jaxling.report import pages, plots, tables

from . import common

_PROMPT = (
    "Please translate words from English to Swahili.\n\nEnglish: house\nSwahili: nyumba"
    "\n\nEnglish: king\nSwahili:"
)
_ANSWER = " Mfalme"
_TEXT = flags.DEFINE_string("text", _PROMPT, "What the model reads.")
_TARGET = flags.DEFINE_string(
    "target", None, "Text whose first token the last position should say."
)
_DECODER_TEXT = flags.DEFINE_string(
    "decoder_text", "", "What the decoder of an encoder-decoder has said."
)
_STACK = flags.DEFINE_enum(
    "stack", "decoder", ["decoder", "encoder"], "Which one of an encoder-decoder."
)
_POSITION = flags.DEFINE_integer(
    "position", -1, "Where the curves are drawn; negative: from the end."
)
_TUNED = flags.DEFINE_string(
    "tuned_lens", None, "Directory of a tuned lens; see above."
)
_TRAIN_TEXT = flags.DEFINE_string(
    "train_text", None, "UTF-8 text, one document a line; the demo's when not given."
)
_TRAIN_STEPS = flags.DEFINE_integer(
    "train_steps", 300, "Steps of 8 texts when a tuned lens is trained.", 1
)
_TOP = flags.DEFINE_integer("top", 10, "Tokens listed at each place.", 1, 1000)


def main(argv: list[str]) -> None:
    """Reads the text, projects every layer, leaves the page, the table and curves."""
    del argv
    name, revision = common.MODEL.value, common.REVISION.value
    model = models.load(name, revision=revision)
    tokenizer = vocabulary.load_tokenizer(name, revision)
    words = vocabulary.load_vocabulary(name, revision)
    pair = isinstance(model, encoder_decoder.EncoderDecoder)
    if not pair and (_DECODER_TEXT.value or _STACK.value == "encoder"):
        raise ValueError(
            f"--decoder_text and --stack=encoder are for encoder-decoders; {name} has"
            " one stack."
        )
    stack = f"{_STACK.value}." if pair else ""
    masked = isinstance(model, encoder.Encoder) or stack == "encoder."
    if masked:
        common.refuse(["target"], "each position is read at its own token.")
    if not _TUNED.value:
        common.refuse(["train_text", "train_steps"], "no --tuned_lens is trained.")
    tokens, inputs = _encoded(model, tokenizer, pair)
    read = inputs["decoder_tokens"] if stack == "decoder." else tokens
    targets = _targets(tokenizer, read[0], masked)
    place = _POSITION.value
    if not -read.shape[1] <= place < read.shape[1]:
        raise ValueError(f"--position must be one of {read.shape[1]}; got {place}.")
    view = _lens(model, tokenizer, stack)
    systems = writing_systems.writing_systems(words.tokens, words.special)
    sizes = model.unembed_matrix.shape[0]
    groups = {
        "languages": lens.token_groups(_languages(tokenizer), sizes),
        "scripts": lens.token_groups(_scripts(systems, sizes), sizes),
    }
    run = common.begin("lens", {"tokens": tokens.tolist()})
    name_of_stream = stack + "resid_post"
    _, cache = model.run_with_cache(tokens, names_filter=(name_of_stream,), **inputs)
    hidden = cache[name_of_stream][:, 0]
    found = lens.project(
        view,
        hidden,
        k=min(_TOP.value, sizes),
        entropy=True,
        divergence=True,
        targets=targets,
        groups=np.concatenate([group.weights for group in groups.values()]),
    )
    top, entropy = np.asarray(found.top_tokens), np.asarray(found.entropy)
    silent = np.argwhere(top[..., 0] < 0)
    if len(silent):
        layer, position = silent[0]
        raise ValueError(
            f"Layer {layer} of {name} says nothing at position {position} (and at"
            f" {len(silent) - 1} other places): its hidden states, or the unembedding,"
            " are not numbers."
        )
    said = lens.project(view, hidden, targets=top[..., 0].T)
    lines = np.exp(np.asarray(said.target_log_probs))
    depth = len(top)
    pages.save_trajectory(
        run.workdir / "lens.html",
        words.tokens,
        read[0],
        top,
        np.exp(np.asarray(found.top_log_probs)),
        layers=[str(i) for i in range(depth)],
        targets=targets.tolist(),
        ranks=np.asarray(found.target_ranks)[..., 0],
        target_probabilities=np.exp(np.asarray(found.target_log_probs)[..., 0]),
        entropy=entropy,
        kl=np.asarray(found.kl_to_final),
        lines=lines,
        masked=masked,
        title=f"{view.reading.capitalize()}: {name.rstrip('/').split('/')[-1]}",
        about="The top token by layer and position of: "
        + " ".join(tables.shorten(_TEXT.value, 200).split()),
    )
    spelled = [*words.tokens, *[""] * (sizes - len(words.tokens))]
    _save_table(run.workdir, found, read[0], targets, spelled)
    tops = _draw_tokens(run.workdir, view, top[:, place, 0], lines[:, place], spelled)
    mass = _draw_groups(
        run.workdir, view, groups, np.asarray(found.group_mass)[:, place]
    )
    ranks = np.asarray(found.target_ranks)[:, place, 0]
    summary = {
        "reading": view.reading,
        "positions": len(read[0]),
        "position": place,
        "top_by_layer": tops,
        "target": spelled[targets[place]] if targets[place] >= 0 else None,
        "target_rank_by_layer": ranks.tolist(),
        "agreement_with_last_layer": np.asarray(found.agrees).mean(1).tolist(),
        "kl_to_final": np.asarray(found.kl_to_final).mean(1).tolist(),
        "mass": mass,
    }
    common.finish(run, summary)
    # People count places from 1; ranks in the files begin with 0, and -1 is none.
    rows = [
        [i, *tops[i], entropy[i, place].item(), int(rank) + 1 if rank >= 0 else "–"]
        for i, rank in enumerate(ranks)
    ]
    print(f"{view.reading}, after {spelled[read[0][place]]!r}:")
    print(
        tables.format_table(
            ["layer", "top token", "probability", "entropy", "target's place"], rows
        )
    )
    print(f"\nThe map: {run.workdir / 'lens.html'} (opens in any browser)")
    print(f"Its numbers: {run.workdir / 'trajectory.parquet'}; pictures beside it.")


def _encoded(model, tokenizer, pair: bool) -> tuple[np.ndarray, dict]:
    """Tokens `[1, n]`, and the decoder's where there is one."""
    tokens = np.array([tokenizer.encode(_text(_TEXT)).ids])
    if not tokens.size:
        raise ValueError("--text has no token.")
    if not pair:
        return tokens, {}
    said = tokenizer.encode(_text(_DECODER_TEXT), add_special_tokens=False).ids
    start = _start(model) if model.spec.start_token is not None or not said else []
    return tokens, {"decoder_tokens": np.array([[*start, *said]])}


def _text(flag) -> str:
    """A flag's text; a shell hands over bytes that are not text as lone surrogates."""
    text = flag.value or ""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"--{flag.name} is not UTF-8: {ascii(text)}.")
    return text


def _start(model) -> list[int]:
    """What the decoder of a pair begins with."""
    return np.asarray(model.prompt(np.zeros((1, 1)), None))[0].tolist()


def _targets(tokenizer, read: np.ndarray, masked: bool) -> np.ndarray:
    """What each position should say: the next token, or a masked model's own."""
    if masked:
        return np.array(read)
    target = _text(_TARGET) or (_ANSWER if _TEXT.value == _PROMPT else "")
    wanted = tokenizer.encode(target, add_special_tokens=False).ids[:1]
    return np.array([*read[1:], *(wanted or [-1])])


def _lens(model, tokenizer, stack: str) -> lens.LogitLens | lens.TunedLens:
    """The lens that the flags ask for, trained and saved if it is not there yet."""
    if not _TUNED.value:
        return lens.LogitLens(model, stack)
    if pathlib.Path(_TUNED.value).exists():
        saved = lens.load_lens(model, _TUNED.value)
        if saved.stack != stack:
            raise ValueError(
                f"The lens in {_TUNED.value} reads the {saved.stack[:-1]}, not the"
                f" {stack[:-1]}."
            )
        return saved
    if _TRAIN_TEXT.value:
        content = pathlib.Path(_TRAIN_TEXT.value).read_bytes()
        try:
            texts = content.decode().splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{_TRAIN_TEXT.value} is not UTF-8: {error}") from None
    else:
        texts = [
            " " + verse
            for column in demo.verses("train").text.values()
            for verse in column
        ]
    batches = lens.training_batches(
        texts,
        tokenizer,
        steps=_TRAIN_STEPS.value,
        length=min(128, model.spec.length or 128),
        seed=common.SEED.value,
        begin=_start(model) if stack else None,
    )
    shown = tqdm.tqdm(batches, "training", _TRAIN_STEPS.value, disable=None)
    trained = lens.train_tuned_lens(model, shown, stack=stack)
    lens.save_lens(trained.lens, _TUNED.value)
    logging.info("Loss %.3f -> %.3f nats", trained.losses[0], trained.losses[-1])
    return trained.lens


def _languages(tokenizer) -> dict[str, set[int]]:
    """Tokens of the words of each language of the lexicons."""
    test, train = common.lexicons()
    words = word_translation.words_of(
        {pair: [*pairs, *train[pair]] for pair, pairs in test.items()}
    )
    return word_translation.tokens_of(words, tokenizer)


def _scripts(systems: list[str], size: int) -> dict[str, set[int]]:
    """Tokens of each writing system."""
    found: dict[str, set[int]] = {}
    for token, system in enumerate(systems[:size]):
        found.setdefault(system, set()).add(token)
    return found


def _save_table(workdir, found, read, targets, spelled) -> None:
    """One row for every layer and position."""
    depth, n = found.entropy.shape
    top = np.asarray(found.top_tokens).reshape(depth * n, -1)
    tables.write_parquet(
        workdir / "trajectory.parquet",
        {
            "layer": np.repeat(np.arange(depth), n),
            "position": np.tile(np.arange(n), depth),
            "token_id": np.tile(read, depth),
            "token": [spelled[i] for i in read] * depth,
            "target_id": np.tile(targets, depth),
            "target": [spelled[i] if i >= 0 else "" for i in targets] * depth,
            "target_rank": np.asarray(found.target_ranks)[..., 0].ravel(),
            "target_log_probability": np.asarray(found.target_log_probs)[
                ..., 0
            ].ravel(),
            "entropy": np.asarray(found.entropy).ravel(),
            "kl_to_final": np.asarray(found.kl_to_final).ravel(),
            "agrees_with_final": np.asarray(found.agrees).ravel(),
            "top_ids": top,
            "top_tokens": [[spelled[i] for i in row] for row in top],
            "top_log_probabilities": np.asarray(found.top_log_probs).reshape(top.shape),
        },
    )


def _draw_tokens(workdir, view, top, lines, spelled) -> list[list]:
    """Curves of the tokens that are top at any layer; each layer's top token."""
    depth = len(top)
    first = {int(token): m for m, token in reversed(list(enumerate(top)))}
    order = sorted(first, key=lambda token: first[token])
    plots.save_curves(
        workdir / "tokens.png",
        [spelled[token] for token in order],
        [lines[:, first[token]] for token in order],
        title="Tokens that are top at any layer",
        x_label=f"layer ({view.reading})",
        # A single curve has no legend.
        value_label=f"probability of {spelled[order[0]]}"
        if len(order) == 1
        else "probability",
        limits=_from_zero(lines),
    )
    return [[spelled[top[i]], float(lines[i, i])] for i in range(depth)]


def _from_zero(values: np.ndarray) -> tuple[float, float]:
    """Limits of an axis, so that small probabilities can be told apart."""
    return 0.0, min(1.0, 1.05 * float(np.nanmax(values)))


def _draw_groups(workdir, view, groups, mass) -> dict[str, dict]:
    """Curves of the ten largest groups: lower bounds, with a band up to the upper."""
    summary, used = {}, 0
    for kind, group in groups.items():
        width = len(group.weights)
        bounds = lens.mass_bounds(group, mass[:, used : used + width])
        used += width
        gaps = (bounds.upper - bounds.lower).T
        largest = np.argsort(-bounds.upper.max(0), kind="stable")[:10]
        plots.save_curves(
            workdir / f"{kind}.png",
            [group.names[i] for i in largest],
            bounds.lower.T[largest],
            errors=[np.stack([0 * gap, gap]) for gap in gaps[largest]],
            title=f"Probability of each {kind[:-1]}'s tokens",
            x_label=f"layer ({view.reading})",
            value_label="at least (line), and at most (band)",
            limits=_from_zero(bounds.upper),
        )
        summary[kind] = {
            name: {"lower": low.tolist(), "upper": high.tolist()}
            for name, low, high in zip(group.names, bounds.lower.T, bounds.upper.T)
        }
    return summary


if __name__ == "__main__":
    common.launch(main)
