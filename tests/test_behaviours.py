"""The classification rule, on hand-made layers and on a planted residual stream."""

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from jaxling import behaviours, kernels, models, word_translation

SOURCE, ANSWER, PIVOT, OTHER = 1, 2, 3, 4


def layers(*tops):
    """`(token, probability)` of each layer, for one item."""
    tokens, probabilities = np.array(tops).T
    return tokens[:, None].astype(int), probabilities[:, None]


@pytest.mark.parametrize(
    "tops, expected",
    [
        ([(OTHER, 0.2), (PIVOT, 0.9), (ANSWER, 0.8)], "pivot"),
        ([(OTHER, 0.2), (PIVOT, 0.7), (ANSWER, 0.8)], "co-occurrence"),
        ([(SOURCE, 0.9), (PIVOT, 0.7), (ANSWER, 0.8)], "co-occurrence"),
        ([(ANSWER, 0.9), (PIVOT, 0.7), (ANSWER, 0.8)], "co-occurrence"),
        ([(PIVOT, 0.8), (OTHER, 0.1), (ANSWER, 0.8)], "co-occurrence"),  # later wins
        ([(OTHER, 0.8), (PIVOT, 0.8), (ANSWER, 0.1)], "pivot"),
    ],
)
def test_the_firmest_token_decides(tops, expected):
    found = behaviours.classify(*layers(*tops), [{SOURCE}], [{ANSWER}])
    assert found.kind == [expected]


def test_a_filter_leaves_soft_items_undecided():
    tops = layers((PIVOT, 0.1), (ANSWER, 0.05))
    for minimum, expected in [(None, "pivot"), (0.05, "pivot"), (0.1, "none")]:
        found = behaviours.classify(*tops, [{SOURCE}], [{ANSWER}], minimum=minimum)
        assert found.kind == [expected]


def test_the_older_rule_asks_for_any_firm_foreign_token():
    tops = layers((PIVOT, 0.1), (SOURCE, 0.9), (ANSWER, 0.8))
    found = behaviours.classify(*tops, [{SOURCE}], [{ANSWER}], rule="threshold")
    assert (found.kind, found.layer[0], found.token[0]) == (["pivot"], 0, PIVOT)
    found = behaviours.classify(
        *tops, [{SOURCE}], [{ANSWER}], rule="threshold", minimum=0.2
    )
    assert (found.kind, found.token[0]) == (["co-occurrence"], SOURCE)


def test_items_that_share_a_token_are_skipped_unless_it_is_ignored():
    tops = layers((PIVOT, 0.9), (ANSWER, 0.8))
    both = [{SOURCE, 9}], [{ANSWER, 9}]
    assert behaviours.classify(*tops, *both).kind == ["skipped"]
    assert behaviours.classify(*tops, *both, ignored={9}).kind == ["pivot"]


def test_a_planted_model_is_recovered_item_by_item(rng):
    """A residual stream in which some items go through a pivot's direction.

    Ten layers move from the source word's unembedding row to the answer's; half of the
    items go by way of another word's row, with a larger norm: firmer than the answer.
    """
    vocab, d, n, depth = 600, 64, 80, 10
    unembed = rng.normal(size=(vocab, d)).astype("f")
    unembed /= np.linalg.norm(unembed, axis=1, keepdims=True)
    ids = np.stack([rng.permutation(vocab)[:3] for _ in range(n)])
    source, pivot, answer = ids.T
    planted = rng.random(n) < 0.5
    time = np.linspace(0, 1, depth)[:, None, None]
    start, way, end = (unembed[i] for i in (source, pivot, answer))
    direct = (1 - time) * 10 * start + time * 20 * end
    middle = np.exp(-((time - 0.5) ** 2) / 0.02)
    through = (1 - middle) * direct + middle * 30 * way
    hidden = np.where(planted[:, None], through, direct).astype("f")
    hidden += 0.05 * rng.normal(size=hidden.shape).astype("f")
    seen = kernels.project_layers(hidden, unembed, k=1)
    found = behaviours.classify(
        np.asarray(seen.top_tokens)[..., 0],
        np.exp(np.asarray(seen.top_log_probs)[..., 0]),
        [{i} for i in source],
        [{i} for i in answer],
    )
    assert [k == "pivot" for k in found.kind] == planted.tolist()
    np.testing.assert_array_equal(found.token[planted], pivot[planted])
    assert np.all((2 < found.layer[planted]) & (found.layer[planted] < 7))
    counted = behaviours.shares(found.kind)
    assert counted.pivot == planted.sum() and counted.skipped == 0
    assert counted.pivot_share == pytest.approx(planted.mean())


@pytest.fixture(scope="module")
def parted():
    """A tokenizer that parts the space from the word: its answers begin with a mark."""
    words = ["<unk>", "\u2581", "Please", "translate", "words", "from", "to", ":", "."]
    words += ["English", "French", "\n", *(f"w{i}" for i in range(14))]
    words += [f"m{i}" for i in range(14)]
    found = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>")
    )
    found.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    found.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex("\u2581|:|\\.|\n"), behavior="isolated"
    )
    return found


@pytest.mark.parametrize("marker", [False, True])
def test_a_trace_reads_the_layers_where_the_answer_begins(parted, marker):
    """Against one prompt at a time and the models' own logits.

    With `marker`, the first layer says firmly what the source words begin with.
    """
    config = dict(model_type="llama", vocab_size=50, hidden_size=32)
    config |= dict(intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    graph, parameters = nnx.split(models.build(config, jax.random.key(3)))
    # Matrices ten times those of a fresh model, so that layers differ.
    grown = jax.tree.map(lambda a: a * (10 if a.ndim > 2 else 1), parameters)
    model = nnx.merge(graph, grown)
    model.unembedding[...] = model.unembedding[...] * 60
    pairs = {("eng", "fra"): [(f"w{i}", f"m{i}") for i in range(14)]}
    names = {"eng": "English", "fra": "French"}
    task = word_translation.build_task(pairs, names, count=5)
    rng, prompts = np.random.default_rng(4), []
    for item in task.items:
        shots = word_translation.draw_examples(task, item, rng, 2)
        text = word_translation.prompt(task, item, shots, item.word)
        prompts.append(np.array([parted.encode(f"{text} {item.answer}").ids]))
    if marker:
        _, cache = model.run_with_cache(prompts[1])
        first, *_, last = model.final_norm(cache["resid_post"][:, 0, -2])
        model.unembedding[...] = model.unembedding[...].at[1].set(2 * (first - last))
    found = behaviours.trace(model, parted, task, shots=2, seed=4, batch=2)
    marked = 0
    for i, (item, tokens) in enumerate(zip(task.items, prompts)):
        # Behind the colon stands a marker, which the answer follows.
        assert found.position[i] == tokens.shape[1] - 2
        assert found.answer_tokens[i] == [parted.token_to_id(item.answer)]
        assert found.source_tokens[i] == [parted.token_to_id(item.word)]
        _, cache = model.run_with_cache(tokens)
        stream = cache["resid_post"][:, 0, -2]
        p = np.asarray(jax.nn.softmax(model.unembed(model.final_norm(stream))))
        np.testing.assert_array_equal(found.top_tokens[:, i], p.argmax(-1))
        np.testing.assert_allclose(found.probabilities[:, i], p.max(-1), rtol=1e-4)
        # B5 of the paper's code, word for word: a marker is one of the word's tokens.
        firmest = max(range(3), key=lambda layer: (p[layer].max(), layer))
        token, written = p[firmest].argmax(), parted.encode(f" {item.word}").ids
        direct = token == p[-1].argmax() or token in written
        assert found.behaviours.kind[i] == ("co-occurrence" if direct else "pivot")
        assert written[0] == parted.token_to_id("\u2581")
        marked += direct and token == written[0] != p[-1].argmax()
        own = p[:, found.source_tokens[i][0]], p[:, found.answer_tokens[i][0]]
        np.testing.assert_allclose(found.source_mass[:, i], own[0], rtol=1e-3)
        np.testing.assert_allclose(found.answer_mass[:, i], own[1], rtol=1e-3)
        decided = found.behaviours
        if decided.kind[i] == "pivot" and decided.token[i] not in (
            *found.source_tokens[i],
            *found.answer_tokens[i],
        ):
            pivot = p[:, decided.token[i]]
            np.testing.assert_allclose(found.pivot_mass[:, i], pivot, rtol=1e-3)
        else:
            assert np.isnan(found.pivot_mass[:, i]).all()
    # Or a branch above was never taken.
    assert "pivot" in found.behaviours.kind and bool(marked) == marker
    given = behaviours.trace(
        model, parted, task, shots=2, seed=4, pivots=[{40, 41}] * 5, minimum=1.0
    )
    assert set(given.behaviours.kind) == {"none"}
    assert np.isfinite(given.pivot_mass).all()


def test_a_layer_that_is_no_number_has_no_behaviour(parted):
    config = dict(model_type="llama", vocab_size=50, hidden_size=32)
    config |= dict(intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    model = models.build(config, jax.random.key(3))
    model.unembedding[...] = model.unembedding[...].at[5, 5].set(np.nan)
    pairs = {("eng", "fra"): [(f"w{i}", f"m{i}") for i in range(14)]}
    names = {"eng": "English", "fra": "French"}
    task = word_translation.build_task(pairs, names, count=1)
    with pytest.raises(ValueError, match="Block 0 of the model says nothing"):
        behaviours.trace(model, parted, task, shots=1)


def test_tokens_are_of_the_languages_whose_words_hold_them(parted):
    item = word_translation.Item("eng", "fra", "w1", "m1", ("w2",))
    task = word_translation.Task({}, {("eng", "fra"): [("w3", "w2")]}, [item])
    found = behaviours.token_languages(task, parted)
    expected = {"w1": {"eng"}, "m1": {"fra"}, "w2": {"eng", "fra"}, "w3": {"eng"}}
    for word, languages in expected.items():
        assert found[parted.token_to_id(word)] == languages


def test_what_does_not_fit_is_said():
    tops = layers((1, 0.5), (2, 0.5))
    with pytest.raises(ValueError, match="`rule`"):
        behaviours.classify(*tops, [{1}], [{2}], rule="first")
    with pytest.raises(ValueError, match=r"\[layer, 2\]"):
        behaviours.classify(*tops, [{1}, {2}], [{2}, {1}])
    with pytest.raises(ValueError, match=r"`minimum` must be in \[0, 1\]; got nan"):
        behaviours.classify(*tops, [{1}], [{2}], minimum=float("nan"))
    with pytest.raises(ValueError, match="`answer_tokens`"):
        behaviours.classify(*tops, [{1}], [])
