"""What does each layer of a model know about its tokens, beyond what words tell?

    python -m experiments.layer_probes --model=demo

Default: the built-in model `demo` on verses that it never saw, ten languages; probes
for the language and the script of a word at every layer; and which kind of book a verse
is from, trained on one language and tested on all the others.

Expect: on `demo`, in a minute, the language at 93% from the embedding, 96% after one
layer and 99% after two, with the control task at 50%; after one layer the kind of book
at 59% within a language (chance 33%), 48% across languages, 56% without each language's
mean.

Every label against the others, class-balanced, five folds, logistic regression with
penalty 1 on the residual stream after each block (layer 0 is the input embedding). No
word is on both sides of a fold, so a probe cannot score by having seen the word. The
control task gives every word a random label; selectivity is accuracy less that of the
control (Hewitt and Liang, 2019, https://arxiv.org/abs/1909.03368), and near zero where
a probe could learn anything. A label with fewer than 50 rows is left out, and so is one
that only one word has: both are named, with the number of their rows.

`--texts=FILE.tsv` brings labels of your own: the first line names the columns `text`,
`label` and perhaps `language` and `item` (the same for translations). With
`--level=sentence` a text has one label and the vector is the mean of its tokens; with
`--level=token` every word has one. Where texts, not words, have labels and there are
several languages, the transfer matrix trains on each and tests on all (balanced
accuracy; translations of one text are never on both sides), as the vectors are and with
the mean of each language taken away; a language without five rows of every label that
is probed is left out. Labels of words are probed in all languages together, without a
transfer matrix.
"""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from jaxling import checkpoints, labelled_text, models, probes, writing_systems
from jaxling.checkpoints import sources
from jaxling.report import plots, tables

from . import common

_TEXTS = flags.DEFINE_string("texts", None, "TSV of labelled texts; built-in if none.")
_LEVEL = flags.DEFINE_enum(
    "level",
    "token",
    ["token", "sentence"],
    "What has a label: words, or whole texts. Of --texts, only whole ones have a"
    " transfer matrix between languages. A label needs 50 rows.",
)
_VERSES = 60  # of each language
_LEAST = 50  # rows of a label, below which it is not probed


def main(argv: list[str]) -> None:
    """Runs the model, fits all layers at once, writes tables and pictures."""
    del argv
    name, level = common.MODEL.value, _LEVEL.value
    common.refuse(["languages"], "all that the texts are in are probed.")
    if sources.is_local(name):
        common.refuse(["revision"], f"{name} is no model of the hub.")
    if _TEXTS.value:
        common.refuse(["per_language"], "all texts of --texts are read.")
        texts = labelled_text.read_texts(_TEXTS.value, level=level)
    else:
        texts = labelled_text.demo_texts(common.PER_LANGUAGE.value or _VERSES)
    for kind, labels in _labels(texts, level, _rows(texts, level)).items():
        _check(kind, labels)  # before anything is computed
    tokenizer = labelled_text.load_tokenizer(name, common.REVISION.value)
    model = models.load(name, revision=common.REVISION.value, dtype="float32")
    checkpoint = checkpoints.open_checkpoint(name, common.REVISION.value)
    weights = [(own, checkpoint.digest(own)) for own in sorted(checkpoint.tensor_names)]
    inputs = {
        "texts": {"count": len(texts.texts), "sha256": _digest(texts)},
        "weights": _digest(weights),
    }
    run = common.begin("layer_probes", inputs)

    found = labelled_text.states(model, tokenizer, texts.texts, level=level)
    if found.cut:
        print(
            f"{found.cut} of {len(texts.texts)} texts are cut: only their start counts."
        )
    kinds = _labels(texts, level, list(zip(found.text, found.place)))
    types = found.words if level == "token" else [texts.items[i] for i in found.text]
    summary = {
        kind: _probe(run.workdir, kind, found.vectors, labels, types)
        for kind, labels in kinds.items()
    }
    if len(set(texts.languages)) > 1 and (level == "sentence" or not _TEXTS.value):
        if level == "token":
            found = labelled_text.states(
                model, tokenizer, texts.texts, level="sentence"
            )
        # Of labels that were probed, those that had enough rows.
        names = summary["label"]["labels"] if _TEXTS.value else set(texts.labels)
        summary["transfer"] = _transfer(run.workdir, found, texts, names)
    common.finish(run, summary)
    print(f"\nPictures, tables and summary.json are in {run.workdir}.")


def _digest(content) -> str:
    return hashlib.sha256(repr(content).encode(errors="surrogatepass")).hexdigest()


def _rows(texts: labelled_text.Texts, level: str) -> list[tuple[int, int]]:
    """Number of the text and of the word in it, for each row if no text were cut."""
    return [
        (i, place)
        for i, text in enumerate(texts.texts)
        for place in range(len(text.split()) if level == "token" else 1)
    ]


def _labels(
    texts: labelled_text.Texts, level: str, rows: Sequence[tuple[int, int]]
) -> dict[str, list[str]]:
    """The labels of rows, by what they tell."""
    if _TEXTS.value:
        labels = texts.labels
        if level == "token":
            return {"label": [labels[i][place] for i, place in rows]}
        return {"label": [labels[i] for i, _ in rows]}
    pieces = [text.split() if level == "token" else [text] for text in texts.texts]
    return {
        "language": [texts.languages[i] for i, _ in rows],
        "script": writing_systems.writing_systems([pieces[i][j] for i, j in rows]),
    }


def _check(kind: str, labels: Sequence[str]) -> None:
    """Raises ValueError where fewer than two labels have enough rows."""
    counts = collections.Counter(labels).most_common()
    if len(counts) < 2 or counts[1][1] < _LEAST:
        told = [f"{label} ({count})" for label, count in counts]
        raise ValueError(
            f"Probes for the {kind} need two labels with at least {_LEAST} rows; the"
            f" labels are {', '.join(told[:20])}{', ...' * (len(told) > 20)}."
        )


def _probe(workdir, kind: str, vectors, labels, types) -> dict:
    """Probes and their controls on every layer: table, heat-maps, curves."""
    result = probes.probe_layers(
        vectors, labels, types, least=_LEAST, seed=common.SEED.value
    )
    layers = [str(layer) for layer in range(len(vectors))]
    accuracy, selectivity = result.accuracy.mean, result.selectivity
    best = np.argmax(accuracy, axis=0)
    print(f"\n{kind}: {len(types):,} rows, {len(layers)} layers\n")
    print(
        tables.format_table(
            [
                kind,
                "rows",
                "embedding",
                "best layer",
                "accuracy",
                "95% from",
                "control",
            ],
            [
                [
                    label,
                    result.rows[i],
                    accuracy[0, i],
                    int(best[i]),
                    accuracy[best[i], i],
                    result.accuracy.low[best[i], i],
                    result.control.mean[best[i], i],
                ]
                for i, label in enumerate(result.names)
            ],
        )
    )
    if result.left_out:
        told = [f"{label} ({why})" for label, why in result.left_out.items()]
        print(f"Left out, under {_LEAST} rows or in one fold: {', '.join(told)}")
    for what, values, limits in (
        ("accuracy", accuracy, (0.5, 1.0)),
        ("selectivity", selectivity, None),
    ):
        plots.save_heatmap(
            workdir / f"{kind}_{what}.png",
            layers,
            result.names,
            values,
            title=f"{what.capitalize()} of probes for one {kind} against the others",
            row_label="layer",
            value_label=what,
            limits=limits,
        )
    plots.save_curves(
        workdir / f"{kind}_layers.png",
        ["task", "control task"],
        [accuracy.mean(axis=1), result.control.mean.mean(axis=1)],
        title=f"Probes for the {kind}, mean over {len(result.names)} labels",
        x_label="layer",
        value_label="held-out accuracy",
        reference=0.5,
    )
    grid = np.indices(accuracy.shape).reshape(2, -1)
    tables.write_parquet(
        workdir / f"{kind}_layers.parquet",
        {
            "layer": grid[0],
            "label": [result.names[i] for i in grid[1]],
            "accuracy": accuracy.ravel(),
            "low": result.accuracy.low.ravel(),
            "high": result.accuracy.high.ravel(),
            "control": result.control.mean.ravel(),
            "selectivity": selectivity.ravel(),
        },
    )
    return {
        "labels": result.names,
        "accuracy_by_layer": accuracy.mean(axis=1).tolist(),
        "control_by_layer": result.control.mean.mean(axis=1).tolist(),
        "selectivity_by_layer": selectivity.mean(axis=1).tolist(),
        "unsolved": result.unsolved,
        "left_out": result.left_out,
    }


def _transfer(
    workdir, found: labelled_text.States, texts: labelled_text.Texts, names
) -> dict:
    """Trained on one language, tested on each: heat-map of the best layer."""
    labels = [texts.labels[i] for i in found.text]
    rows = [i for i, label in enumerate(labels) if label in names]
    vectors = found.vectors[:, rows]
    try:
        result, centred = (
            probes.transfer_by_layer(
                vectors,
                [texts.languages[found.text[i]] for i in rows],
                [labels[i] for i in rows],
                [texts.items[found.text[i]] for i in rows],
                centred=centred,
                seed=common.SEED.value,
            )
            for centred in (False, True)
        )
    except ValueError as error:
        # The probes are done, and worth keeping.
        print(f"\nNo transfer matrix. {error}")
        return {"left_out": str(error)}
    best = int(np.argmax(result.across))
    print(
        f"\nTransfer of {', '.join(result.labels)} between {len(result.names)}"
        f" languages, balanced accuracy (chance {1 / len(result.labels):.2f})\n"
    )
    print(
        tables.format_table(
            ["layer", "own language", "other languages", "others, centred"],
            [
                [i, *row]
                for i, row in enumerate(
                    zip(result.within, result.across, centred.across)
                )
            ],
        )
    )
    if result.dropped:
        print(f"Left out, for want of a label: {', '.join(result.dropped)}")
    plots.save_heatmap(
        workdir / "transfer.png",
        result.names,
        result.names,
        result.accuracy[best],
        title=f"Trained on the row's language, tested on the column's (layer {best})",
        row_label="trained on",
        column_label="tested on",
        value_label="balanced accuracy",
        limits=(result.accuracy[best].min(), result.accuracy[best].max()),
    )
    layer, source, target = np.indices(result.accuracy.shape).reshape(3, -1)
    tables.write_parquet(
        workdir / "transfer.parquet",
        {
            "layer": layer,
            "source": [result.names[i] for i in source],
            "target": [result.names[i] for i in target],
            "balanced_accuracy": result.accuracy.ravel(),
            "balanced_accuracy_centred": centred.accuracy.ravel(),
        },
    )
    return {
        "languages": result.names,
        "within_by_layer": result.within.tolist(),
        "across_by_layer": result.across.tolist(),
        "across_by_layer_centred": centred.across.tolist(),
        "best_layer": best,
        "dropped": result.dropped,
    }


if __name__ == "__main__":
    common.launch(main)
