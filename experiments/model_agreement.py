"""Do models put the same tokens next to each other, and span the same space?

    python -m experiments.model_agreement --model=xlm-roberta-base
        --models=google/mt5-base,bigscience/bloom-560m

Default: the built-in models `demo` and `demo-small`, over all the tokens they share.

Expect: 51% of the 100 neighbours shared (chance 1.8%) and a first angle above 0.999
(0.32 and 0.29 against a random matrix): both embeddings began with statistics of the
same verses, and share 26% before `demo-small` is trained. In the paper XLM-R-XL and XXL
share up to 60 of 100 neighbours, mT5 models 20 to 30, BLOOM-1.1B 5 to 10 with others;
first canonical angle 0.99 within XLM-R, 0.95 to 0.97 within mT5, 0.15 to 0.27 against a
random matrix of 512 columns.

Figures 7 and 8 of Hyperpolyglot LLMs (Wen-Yi and Mimno, 2023,
https://arxiv.org/abs/2311.18034). For every token that all models have, its 100 nearest
(cosine, itself among them) inside that shared set are found in each model; the overlap
is in per cent of the list. The band of chance, which the paper lacks, is what remains
when one model's tokens are relabelled at random, from the least to the most of
--permutations such draws: hubs stay hubs, and the token itself is in both lists, which
is 1 of the 100. The angle is the cosine of the smallest
principal angle between the column spaces, an upper bound on all others; --center
subtracts the mean row first (the paper does not say). It is 1 by necessity where two
spaces have more columns together than there are shared tokens. Tokens whose vector is
zero in one of the models are left out; one that is not finite is refused.
"""

import itertools

import numpy as np
from absl import flags

from jaxling import checkpoints, kernels, neighborhoods, vocabulary
from jaxling.report import plots, tables

from . import common

_K = 100
_RANDOM_WIDTH = 512
_PERMUTATIONS = flags.DEFINE_integer(
    "permutations", 20, "Random relabellings behind the band of chance.", 1
)


def main(argv: list[str]) -> None:
    """Compares every pair of models, writes the tables and the two figures."""
    del argv
    models = common.models()
    if len(models) < 2:
        raise ValueError("At least two different models are needed: see --models.")
    revisions = [common.REVISION.value, *(None for _ in models[1:])]
    opened = [checkpoints.open_checkpoint(*pair) for pair in zip(models, revisions)]
    tensors = [common.TENSOR.value, *(None for _ in models[1:])]
    names = [one.input_embeddings(tensor) for one, tensor in zip(opened, tensors)]
    words = [vocabulary.load_vocabulary(*pair) for pair in zip(models, revisions)]
    others = [vocabulary.load_vocabulary(other) for other in common.SHARED_WITH.value]
    ids = vocabulary.shared_tokens(*words, *others)[: len(models)]
    held = [checkpoint.shape(name)[0] for checkpoint, name in zip(opened, names)]
    ids = ids[:, (ids < np.array(held)[:, None]).all(0)]
    spaces = [
        checkpoint.read(name, rows=rows, dtype=np.float32)
        for checkpoint, name, rows in zip(opened, names, ids)
    ]
    there = _have_directions(models, ids, spaces)
    spaces = [space[there] for space in spaces]
    tokens = int(there.sum())
    k = min(common.K.value or _K, tokens)
    if k < 2:
        raise ValueError(f"{', '.join(models)} share {tokens} tokens: too few.")
    digests = [checkpoint.digest(name) for checkpoint, name in zip(opened, names)]
    run = common.begin(
        "model_agreement",
        {
            model: {"tensor": name, "sha256": digest}
            for model, name, digest in zip(models, names, digests)
        },
    )
    lists = [
        np.asarray(kernels.all_pairs_neighbors(space, k=k, include_self=True).indices)
        for space in spaces
    ]
    rows = [_compare(models, spaces, lists, i, j) for i, j in _pairs(models)]
    random = np.random.default_rng(common.SEED.value)
    noise = random.standard_normal((tokens, _RANDOM_WIDTH), np.float32)
    baseline = {
        model: float(_angles(space, noise)[0]) for model, space in zip(models, spaces)
    }
    _report(run.workdir, models, rows, baseline, k, tokens)
    forced = [f"{row['a']} and {row['b']}" for row in rows if row["angle_is_forced"]]
    forced += [
        f"{model} and a random matrix"
        for model, space in zip(models, spaces)
        if _is_forced(tokens, space, noise)
    ]
    if forced:
        print(
            f"Of {'; '.join(forced)} the first angle is 1 by necessity: together they"
            f" have more columns than the {tokens:,} shared tokens."
        )
    if not there.all():
        print(f"{np.sum(~there):,} more are left out: zero in one of the models.")
    print(f"\n{tokens:,} shared tokens; tables and pictures in {run.workdir}.")
    common.finish(
        run,
        {
            "shared_tokens": tokens,
            "tokens_without_direction": int(np.sum(~there)),
            "k": k,
            "pairs": rows,
            "first_angle_with_random": baseline,
        },
    )


def _have_directions(models, ids, spaces) -> np.ndarray:
    """Which tokens have a vector other than zero in every model, bool `[shared]`.

    Raises:
      ValueError: a vector is not finite.
    """
    for model, rows, space in zip(models, ids, spaces):
        wrong = rows[~np.isfinite(space).all(1)]
        if len(wrong):
            raise ValueError(
                f"The token vectors of {model} must be finite; those of {len(wrong)}"
                f" shared tokens are not, the first at ids {wrong[:5].tolist()}."
            )
    return np.all([space.any(1) for space in spaces], axis=0)


def _is_forced(tokens, a, b) -> bool:
    """Whether two spaces must meet, having more columns than there are dimensions."""
    return a.shape[1] + b.shape[1] > tokens - common.CENTER.value


def _angles(a, b):
    return kernels.principal_angles(a, b, center=common.CENTER.value)


def _pairs(models):
    return itertools.combinations(range(len(models)), 2)


def _compare(models, spaces, lists, i, j) -> dict:
    k = lists[i].shape[1]
    shared = neighborhoods.shared_neighbors(lists[i], lists[j])
    chance = neighborhoods.shared_by_chance(
        lists[i],
        lists[j],
        permutations=_PERMUTATIONS.value,
        seed=common.SEED.value,
    )
    angles = _angles(spaces[i], spaces[j])
    return {
        "a": models[i],
        "b": models[j],
        "overlap_percent": float(100 * shared.mean() / k),
        "jaccard": float(np.mean(shared / (2 * k - shared))),
        "chance_percent": float(100 * chance.mean() / k),
        "chance_low": float(100 * chance.min() / k),
        "chance_high": float(100 * chance.max() / k),
        "first_angle": float(angles[0]),
        "mean_angle": float(np.mean(angles)),
        "angle_is_forced": _is_forced(len(spaces[i]), spaces[i], spaces[j]),
    }


def _report(workdir, models, rows, baseline, k, tokens) -> None:
    relabelled = _PERMUTATIONS.value
    header = ["a", "b", f"% of {k} shared", "by chance", "Jaccard", "first angle"]
    fields = ("a", "b", "overlap_percent", "chance_percent", "jaccard", "first_angle")
    print(tables.format_table(header, [[row[f] for f in fields] for row in rows]))
    for model, angle in baseline.items():
        print(f"first angle of {model} with a random matrix: {angle:.3f}")
    tables.write_parquet(
        workdir / "agreement.parquet", {f: [row[f] for row in rows] for f in rows[0]}
    )
    short = ["/".join(model.split("/")[-2:]) for model in models]
    beside = [*short, "random"]
    for field, title, sides, most in [
        ("overlap_percent", f"Per cent of the {k} nearest tokens shared", short, 100),
        ("first_angle", "Cosine of the smallest principal angle", beside, 1),
    ]:
        grid = np.full((len(sides), len(sides)), np.nan)
        for (i, j), row in zip(_pairs(models), rows):
            grid[i, j] = grid[j, i] = row[field]
        if field == "first_angle":
            grid[-1, :-1] = grid[:-1, -1] = list(baseline.values())
        path = workdir / f"{field}.png"
        plots.save_heatmap(path, sides, sides, grid, title=title, limits=(0, most))
    plots.save_bars(
        workdir / "overlap_and_chance.png",
        [f"{a} – {b}" for a, b in itertools.combinations(short, 2)],
        [
            [row["overlap_percent"] for row in rows],
            [row["chance_percent"] for row in rows],
        ],
        series=["shared", "by chance"],
        errors=np.array(
            [
                [[0.0, row["chance_percent"] - row["chance_low"]] for row in rows],
                [[0.0, row["chance_high"] - row["chance_percent"]] for row in rows],
            ]
        ).swapaxes(1, 2),
        title=f"Neighbours of {tokens:,} tokens",
        value_label=f"% of {k}; band: least to most of {relabelled} relabellings",
    )


if __name__ == "__main__":
    common.launch(main)
