"""Encoder-decoders against transformers, both stacks, on tiny random checkpoints."""

import functools
import json

import jax
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

T5 = dict(
    vocab_size=101,
    d_model=48,
    d_kv=12,
    d_ff=64,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=5,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    decoder_start_token_id=0,
)
BART = dict(
    vocab_size=101,
    d_model=40,
    encoder_layers=3,
    decoder_layers=2,
    encoder_attention_heads=5,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=56,
    max_position_embeddings=40,
    decoder_start_token_id=2,
)
CASES = {
    "t5": dict(T5, model_type="t5"),
    "t5-1.1": dict(
        T5, model_type="t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
    "mt5": dict(T5, model_type="mt5", tie_word_embeddings=False),
    "umt5": dict(T5, model_type="umt5", tie_word_embeddings=False),
    "umt5-tied": dict(T5, model_type="umt5", feed_forward_proj="gated-silu"),
    "mbart": dict(BART, model_type="mbart", scale_embedding=True),
    "mbart-untied": dict(BART, model_type="mbart", activation_function="relu"),
    "m2m_100": dict(BART, model_type="m2m_100"),
    "nllb-unscaled": dict(BART, model_type="m2m_100", scale_embedding=False),
}
NAMES = ["*blocks.0.hook_resid_pre", "*resid_post", "*hook_normalized"]


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Makes the checkpoint of a case, once."""
    return functools.cache(lambda case: make(case, tmp_path_factory.mktemp(case)))


@pytest.fixture(params=CASES)
def checkpoint(request, build):
    """A directory of several shards, and the torch model that wrote it."""
    return build(request.param)


def make(case, path):
    values = CASES[case]
    config = transformers.AutoConfig.for_model(**values)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    auto = transformers.AutoModelForSeq2SeqLM
    model = auto.from_config(config).eval().float()
    untied = values.get("tie_word_embeddings") is False
    if untied or "untied" in case:  # transformers 5 ties T5's family whatever it says
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms near one but not one; biases as large as what they are added to.
            scale = "norm" in name and name.endswith("weight")
            # T5 does not scale scores but begins with queries that are smaller; the
            # softmax of large scores would amplify the noise of float32.
            parameter.normal_(float(scale), 0.06 if ".q." in name else 0.2)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    model.save_pretrained(path, max_shard_size="40KB")
    if untied:
        # As the published files say it; and umT5 is then not scaled, as it was before
        # transformers 5 began to force its flag.
        model.config.tie_word_embeddings = False
        written = json.loads((path / "config.json").read_text())
        written["tie_word_embeddings"] = False
        (path / "config.json").write_text(json.dumps(written))
    assert len(list(path.glob("*.safetensors"))) > 1
    return path, model


def sequences():
    """Rows padded on the left, on the right and not at all, on either side."""
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(3, 101, (3, 22)), np.ones((3, 22), int)
    mask[0, :7] = 0
    mask[1, -5:] = 0
    outputs, output_mask = rng.integers(3, 101, (3, 14)), np.ones((3, 14), int)
    output_mask[0, -4:] = 0
    output_mask[2, :3] = 0
    return dict(
        tokens=tokens,
        attention_mask=mask,
        decoder_tokens=outputs,
        decoder_attention_mask=output_mask,
    )


def torch_rows(oracle, inputs, rows=range(3)):
    """Each row by itself and without padding."""
    for row in rows:
        ins, outs = (
            torch.tensor(inputs[name][row][inputs[mask][row].astype(bool)])[None]
            for name, mask in (
                ("tokens", "attention_mask"),
                ("decoder_tokens", "decoder_attention_mask"),
            )
        )
        yield oracle(input_ids=ins, decoder_input_ids=outs, output_hidden_states=True)


def test_both_stacks_and_the_logits_agree_with_transformers(checkpoint, agree, request):
    path, oracle = checkpoint
    inputs = sequences()
    model = models.load(path)
    logits, cache = model.run_with_cache(**inputs, names_filter=NAMES)
    streams = {}
    for side in ("encoder", "decoder"):
        stream = [cache[f"{side}.blocks.0.hook_resid_pre"]]
        stream += list(cache[f"{side}.resid_post"])[:-1]
        last = cache[f"{side}.resid_post"][-1]
        streams[side] = [*stream, getattr(model, side).final_norm(last)]
    np.testing.assert_allclose(
        cache["encoder.ln_final.hook_normalized"], streams["encoder"][-1], atol=1e-5
    )
    with torch.no_grad():
        expected = list(torch_rows(oracle, inputs))
    for row, outputs in enumerate(expected):
        for side, mask, hidden in (
            ("encoder", "attention_mask", outputs.encoder_hidden_states),
            ("decoder", "decoder_attention_mask", outputs.decoder_hidden_states),
        ):
            real = inputs[mask][row].astype(bool)
            for ours, theirs in zip(streams[side], hidden, strict=True):
                agree("hidden", ours[row][real], theirs[0], TOLERANCE)
        agree("logits", logits[row][real], outputs.logits[0], TOLERANCE)
    case = request.node.callspec.params["checkpoint"]
    untied = "untied" in case or CASES[case].get("tie_word_embeddings") is False
    assert (model.unembedding is not None) == untied


def test_what_is_saved_transformers_loads_to_the_same_logits(checkpoint, tmp_path):
    path, oracle = checkpoint
    inputs = sequences()
    models.save(models.load(path), tmp_path)
    again = type(oracle).from_pretrained(tmp_path, attn_implementation="eager")
    again.config.tie_word_embeddings = oracle.config.tie_word_embeddings
    with torch.no_grad():
        for ours, theirs in zip(torch_rows(again, inputs), torch_rows(oracle, inputs)):
            np.testing.assert_array_equal(ours.logits, theirs.logits)


def test_umt5_as_published_is_scaled_by_some_transformers_and_not_here(tmp_path, build):
    """Before 5.24 its flag is forced there; the logits differ by that one factor."""
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    factor = T5["d_model"] ** 0.5 if version < (5, 24) else 1
    path, oracle = build("umt5")
    inputs = sequences()
    unchanged = type(oracle).from_pretrained(path, attn_implementation="eager")
    unchanged.lm_head.weight = oracle.lm_head.weight
    logits = models.load(path)(**inputs)
    with torch.no_grad():
        for row, outputs in enumerate(torch_rows(unchanged, inputs)):
            real = inputs["decoder_attention_mask"][row].astype(bool)
            expected = outputs.logits[0] * factor
            np.testing.assert_allclose(logits[row][real], expected, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["mt5", "mbart-untied"])
def test_an_unembedding_of_its_own_must_be_there(case, tmp_path, build):
    def without(whole):
        return {k: v for k, v in whole.items() if k != "lm_head.weight"}

    path = rewritten(build(case)[0], tmp_path, without)
    written = json.loads((path / "config.json").read_text())
    written["tie_word_embeddings"] = False
    (path / "config.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match="missing tensors: lm_head.weight"):
        models.load(path)


ONE_OF_EACH = pytest.mark.parametrize(
    "case", [name for name, case in CASES.items() if name == case["model_type"]]
)


@ONE_OF_EACH
def test_gradients_agree_with_transformers(case, build, agree_in_gradients):
    path, oracle = build(case)
    model = models.load(path)
    inputs = sequences()
    weights = np.random.default_rng(1).normal(size=(3, 14))
    weights *= inputs["decoder_attention_mask"]

    def loss(model):
        return (jnp.square(model(**inputs)[..., :7]).mean(-1) * weights).sum()

    gradients = nnx.jit(nnx.grad(loss))(model)
    oracle.zero_grad()
    total = 0
    for row, outputs in enumerate(torch_rows(oracle, inputs)):
        real = inputs["decoder_attention_mask"][row].astype(bool)
        each = outputs.logits[0][:, :7].square().mean(-1)
        total = total + (each * torch.tensor(weights[row, real]).float()).sum()
    total.backward()
    agree_in_gradients(model, gradients, oracle, TOLERANCE)


@ONE_OF_EACH
def test_greedy_generation_agrees_with_transformers(case, build):
    path, oracle = build(case)
    inputs = sequences()
    tokens, mask = inputs["tokens"], inputs["attention_mask"]
    model = models.load(path)
    found = models.generate(model, tokens, mask, max_new_tokens=10)
    start = oracle.config.decoder_start_token_id
    oracle.generation_config = transformers.GenerationConfig(
        max_new_tokens=10,
        do_sample=False,
        pad_token_id=0,
        decoder_start_token_id=start,
    )
    for row in range(3):
        real = mask[row].astype(bool)
        expected = oracle.generate(torch.tensor(tokens[row, real])[None])
        np.testing.assert_array_equal(found[row], expected[0].numpy())


def test_a_generation_goes_on_from_given_tokens(build):
    path, _ = build("m2m_100")
    model = models.load(path)
    inputs = sequences()
    tokens, mask = inputs["tokens"], inputs["attention_mask"]
    given = np.array([[2, 7], [2, 8], [2, 9]])
    found = models.generate(model, tokens, mask, max_new_tokens=6, decoder_tokens=given)
    np.testing.assert_array_equal(found[:, :2], given)
    logits = model(tokens, mask, decoder_tokens=found[:, :-1])
    np.testing.assert_array_equal(found[:, 2:], logits.argmax(-1)[:, 1:])


def test_samples_follow_the_probabilities(build):
    path, _ = build("t5")
    model = models.load(path)
    tokens, start = np.full((2000, 3), 7), np.zeros((2000, 1), int)
    logits = model(tokens[:1], decoder_tokens=start[:1])[0, -1]
    share = np.exp(logits / 0.5 - np.logaddexp.reduce(np.asarray(logits / 0.5)))
    found = models.generate(
        model, tokens, max_new_tokens=1, temperature=0.5, key=jax.random.key(0)
    )
    draws = np.bincount(np.asarray(found)[:, -1], minlength=101) / 2000
    # Five standard deviations of a share of 2000 draws.
    np.testing.assert_allclose(draws, share, atol=5 * 0.5 / np.sqrt(2000))
    assert 0.5 * np.abs(draws - share).sum() < 0.5 * np.abs(1 / 101 - share).sum()


def test_old_files_store_the_tied_matrix_up_to_four_times(tmp_path, build):
    path, _ = build("t5")
    inputs = sequences()
    expected = models.load(path)(**inputs)

    def old(whole):
        table = whole["shared.weight"]
        bias = np.ones((8, 5), np.float32)
        unused = (
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        )
        copies = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
        copied = {f"{name}.weight": table.copy() for name in copies}
        return {**whole, **copied, unused: bias}

    def renamed(whole):
        whole["decoder.embed_tokens.weight"] = whole.pop("shared.weight")
        return whole

    def unlike(whole):
        whole["encoder.embed_tokens.weight"] = whole["shared.weight"] + 1
        return whole

    with pytest.raises(CheckpointError, match="is a copy of shared.weight and differs"):
        models.load(rewritten(path, tmp_path / "unlike", unlike))
    for change in (old, renamed):
        model = models.load(rewritten(path, tmp_path / change.__name__, change))
        assert model.unembedding is None
        np.testing.assert_array_equal(model(**inputs), expected)


def test_inputs_that_do_not_fit(build):
    path, _ = build("mbart")
    model = models.load(path)
    tokens = np.full((2, 5), 7)
    with pytest.raises(ValueError, match="`decoder_tokens` must be given"):
        model(tokens)
    with pytest.raises(ValueError, match="as many rows as the tokens, 2; got 1"):
        model(tokens, decoder_tokens=tokens[:1])
    with pytest.raises(ValueError, match="`decoder_tokens` must be .batch, position."):
        model(tokens, decoder_tokens=tokens[0])
    with pytest.raises(ValueError, match="41 positions"):
        model(tokens, decoder_tokens=np.full((2, 41), 7))
    with pytest.raises(
        ValueError, match="`decoder_attention_mask` must have the shape"
    ):
        model(tokens, decoder_tokens=tokens, decoder_attention_mask=tokens[:, :2])
    with pytest.raises(ValueError, match="41 positions"):
        models.generate(model, tokens, max_new_tokens=40)
    with pytest.raises(ValueError, match="No activation.*resid_past"):
        model.run_with_cache(tokens, decoder_tokens=tokens, names_filter="resid_past")


def test_a_hook_in_the_encoder_reaches_the_decoder(build):
    path, _ = build("mt5")
    model = models.load(path)
    inputs = sequences()
    logits, cache = model.run_with_cache(
        **inputs,
        hooks={"encoder.blocks.1.hook_resid_post": lambda x: 0 * x},
        names_filter=["encoder.resid_post", "decoder.blocks.0.cross_attn.hook_pattern"],
    )
    assert np.abs(cache["encoder.blocks.1.hook_resid_post"]).max() == 0
    assert np.abs(logits - model(**inputs)).max() > 0.1
    pattern = cache["decoder.blocks.0.cross_attn.hook_pattern"]
    assert pattern.shape == (3, 5, 14, 22)
    np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-5)
    assert np.abs(pattern[0, :, :, :7]).max() == 0  # padding is not attended to
