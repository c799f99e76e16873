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
a probe could learn anything.

`--texts=FILE.tsv` brings labels of your own: the first line names the columns `text`,
`label` and perhaps `language` and `item` (the same for translations). With
`--level=sentence` a text has one label and the vector is the mean of its tokens; with
`--level=token` every word has one. Where there are several languages, the transfer
matrix trains on each and tests on all (balanced accuracy; translations of one text are
never on both sides), as the vectors are and with the mean of each language taken away.
"""

import numpy as np
from absl import flags

from jaxling import labelled_text, models, probes, writing_systems
from jaxling.report import plots, tables

from . import common

_TEXTS = flags.DEFINE_string("texts", None, "TSV of labelled texts; built-in if none.")
_LEVEL = flags.DEFINE_enum(
    "level", "token", ["token", "sentence"], "What has a label: words, or whole texts."
)
_VERSES = 60  # of each language
_LEAST = 50  # rows of a label, below which it is not probed


def main(argv: list[str]) -> None:
    """Runs the model, fits all layers at once, writes tables and pictures."""
    del argv
    name, level = common.MODEL.value, _LEVEL.value
    if _TEXTS.value:
        texts = labelled_text.read_texts(_TEXTS.value, level=level)
    else:
        texts = labelled_text.demo_texts(common.PER_LANGUAGE.value or _VERSES)
    tokenizer = labelled_text.load_tokenizer(name, common.REVISION.value)
    model = models.load(name, revision=common.REVISION.value, dtype="float32")
    run = common.begin("layer_probes", {"texts": len(texts.texts)})

    found = labelled_text.states(model, tokenizer, texts.texts, level=level)
    if _TEXTS.value:
        labels = [texts.labels[i] for i in found.text]
        if level == "token":
            labels = [own[place] for own, place in zip(labels, found.place)]
        kinds = {"label": labels}
    else:
        kinds = {
            "language": [texts.languages[i] for i in found.text],
            "script": writing_systems.writing_systems(found.words),
        }
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
        summary["transfer"] = _transfer(run.workdir, found, texts)
    common.finish(run, summary)
    print(f"\nPictures, tables and summary.json are in {run.workdir}.")


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
    }


def _transfer(workdir, found: labelled_text.States, texts: labelled_text.Texts) -> dict:
    """Trained on one language, tested on each: heat-map of the best layer."""
    result, centred = (
        probes.transfer_by_layer(
            found.vectors,
            [texts.languages[i] for i in found.text],
            [texts.labels[i] for i in found.text],
            [texts.items[i] for i in found.text],
            centred=centred,
            seed=common.SEED.value,
        )
        for centred in (False, True)
    )
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
