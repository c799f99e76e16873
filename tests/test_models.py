"""Decoders against transformers, layer by layer, on tiny random checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import rewritten
from flax import nnx

from jaxling import models
from jaxling.models import conversion
from jaxling.models.config import read_config

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

# Noise of float32 products in another order; 1e-4 would be a defect.
TOLERANCE = 5e-5

SIZES = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
MULTI_HEAD = {
    name: size
    for name, size in SIZES.items()
    if name not in ("num_key_value_heads", "head_dim")
}
LLAMA_3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
LOCAL = dict(sliding_window=6, attention_bias=True)
CASES = {
    "llama": dict(
        SIZES,
        model_type="llama",
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=LLAMA_3,
    ),
    "llama-tied-odd-heads": dict(
        SIZES,
        model_type="llama",
        hidden_size=40,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=12,
        tie_word_embeddings=True,
    ),
    "llama-yarn": dict(
        SIZES,
        model_type="llama",
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=500.0,
            factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama-linear": dict(
        SIZES,
        model_type="llama",
        rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=2.5),
    ),
    "llama-dynamic": dict(
        SIZES,
        model_type="llama",
        rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, factor=2.0),
    ),
    "mistral": dict(SIZES, model_type="mistral", sliding_window=5),
    "qwen2": dict(
        MULTI_HEAD,
        model_type="qwen2",
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": dict(SIZES, model_type="qwen3", attention_bias=True),
    "olmo": dict(SIZES, model_type="olmo", clip_qkv=0.8, attention_bias=True),
    "olmo2": dict(SIZES, model_type="olmo2", attention_bias=True),
    "gemma2": dict(
        SIZES,
        model_type="gemma2",
        query_pre_attn_scalar=10,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=7.0,
        **LOCAL,
    ),
    "gemma3_text": dict(
        SIZES,
        model_type="gemma3_text",
        num_hidden_layers=7,
        query_pre_attn_scalar=10,
        tie_word_embeddings=False,
        **LOCAL,
    ),
    "gpt2": dict(
        model_type="gpt2",
        vocab_size=101,
        n_positions=64,
        n_embd=35,
        n_layer=3,
        n_head=5,
    ),
    "gpt2-untied": dict(
        model_type="gpt2",
        vocab_size=101,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=False,
    ),
    "gpt_neox": dict(
        MULTI_HEAD,
        model_type="gpt_neox",
        rope_parameters=dict(
            rope_type="default", rope_theta=300.0, partial_rotary_factor=0.5
        ),
    ),
    "gpt_neox-sequential": dict(
        MULTI_HEAD, model_type="gpt_neox", use_parallel_residual=False
    ),
    "gpt_neox-tied-no-bias": dict(
        MULTI_HEAD,
        model_type="gpt_neox",
        tie_word_embeddings=True,
        attention_bias=False,
    ),
    "bloom": dict(
        model_type="bloom", vocab_size=101, hidden_size=35, n_layer=3, n_head=5
    ),
    "bloom-untied": dict(
        model_type="bloom",
        vocab_size=101,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=False,
    ),
    "xglm": dict(
        model_type="xglm",
        vocab_size=101,
        max_position_embeddings=64,
        d_model=40,
        ffn_dim=56,
        num_layers=3,
        attention_heads=5,
    ),
    "xglm-untied": dict(
        model_type="xglm",
        vocab_size=101,
        max_position_embeddings=64,
        d_model=32,
        ffn_dim=56,
        num_layers=2,
        attention_heads=4,
        tie_word_embeddings=False,
    ),
}


@pytest.fixture(scope="session", params=CASES)
def checkpoint(request, tmp_path_factory):
    """A directory of several shards, and the torch model that wrote it."""
    config = transformers.AutoConfig.for_model(**CASES[request.param])
    config.eos_token_id = None  # transformers would stop there
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms near one but not one; biases as large as what they are added to.
            norm = ("norm" in name or "ln_" in name) and "bias" not in name
            offset = "gemma" in request.param  # its norms scale by 1 + the weight
            parameter.normal_(float(norm and not offset), 0.2)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path, model


# For what costs a compilation of its own; variants of a family share the code.
ONE_OF_EACH = pytest.mark.parametrize(
    "checkpoint",
    [name for name, case in CASES.items() if name == case["model_type"]],
    indirect=True,
)


def sequences():
    tokens = np.random.default_rng(0).integers(0, 101, (3, 20))
    mask = np.ones_like(tokens)
    mask[0, :7] = 0
    mask[1, -5:] = 0
    return tokens, mask


def torch_run(model, tokens, mask):
    with torch.no_grad():
        mask = torch.tensor(mask)
        found = model(
            torch.tensor(tokens),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
        )
    return found.logits.numpy(), [hidden.numpy() for hidden in found.hidden_states]


def test_every_layer_and_the_logits_agree_with_transformers(checkpoint, agree):
    path, oracle = checkpoint
    tokens, mask = sequences()
    logits, hidden = torch_run(oracle, tokens, mask)
    model = models.load(path)
    names = ("blocks.0.hook_resid_pre", "resid_post")
    found, cache = model.run_with_cache(tokens, mask, names_filter=names)
    real = mask.astype(bool)
    stream = [cache["blocks.0.hook_resid_pre"], *cache["resid_post"][:-1]]
    stream.append(model.final_norm(cache["resid_post"][-1]))
    for ours, theirs in zip(stream, hidden, strict=True):
        agree("hidden", ours[real], theirs[real], TOLERANCE)
    agree("logits", found[real], logits[real], TOLERANCE)


def test_what_is_saved_transformers_loads_to_the_same_logits(checkpoint, tmp_path):
    path, oracle = checkpoint
    tokens, mask = sequences()
    models.save(models.load(path), tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    expected = torch_run(oracle, tokens, mask)[0]
    np.testing.assert_array_equal(torch_run(again, tokens, mask)[0], expected)


@ONE_OF_EACH
def test_what_is_saved_in_several_files_transformers_loads_too(
    checkpoint, tmp_path, monkeypatch
):
    path, oracle = checkpoint
    tokens, mask = sequences()
    monkeypatch.setattr(conversion, "SHARD", 30_000)
    models.save(models.load(path), tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    expected = torch_run(oracle, tokens, mask)[0]
    np.testing.assert_array_equal(torch_run(again, tokens, mask)[0], expected)


@ONE_OF_EACH
def test_repositories_of_a_family_differ_in_prefixes(checkpoint, tmp_path):
    """Checkpoints of the base model alone have none."""
    path, oracle = checkpoint
    prefix = oracle.base_model_prefix + "."

    def bare(whole):
        return {name.removeprefix(prefix): array for name, array in whole.items()}

    assert set(bare(dict.fromkeys(oracle.state_dict()))) != set(oracle.state_dict())
    found = models.load(rewritten(path, tmp_path, bare))
    for ours, before in zip(
        jax.tree.leaves(found), jax.tree.leaves(models.load(path)), strict=True
    ):
        np.testing.assert_array_equal(ours, before)


@pytest.mark.parametrize("checkpoint", ["llama-tied-odd-heads"], indirect=True)
def test_an_unembedding_that_differs_is_kept_as_in_transformers(
    checkpoint, agree, tmp_path
):
    """Although the config says that it is the embedding."""
    path, _ = checkpoint
    table = "model.embed_tokens.weight"

    def unlike(whole):
        return whole | {"lm_head.weight": whole[table][::-1].copy()}

    ours = models.load(rewritten(path, tmp_path, unlike))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    tokens, mask = sequences()
    real = mask.astype(bool)
    expected = torch_run(theirs, tokens, mask)[0]
    agree("logits", ours(tokens, mask)[real], expected[real], TOLERANCE)
    assert np.abs(models.load(path)(tokens, mask) - ours(tokens, mask)).max() > 0.1


@pytest.mark.parametrize(
    "kind, auto",
    [
        ("mistral", transformers.AutoModel),
        ("llama", transformers.AutoModelForSequenceClassification),
    ],
)
def test_embedders_and_classifiers_give_their_last_state(kind, auto, tmp_path):
    """Files without an unembedding, of a config that does not tie it."""
    config = transformers.AutoConfig.for_model(**CASES[kind])
    config._attn_implementation, config.pad_token_id = "eager", 0
    oracle = auto.from_config(config).eval()
    oracle.save_pretrained(tmp_path / "one")
    tokens, mask = sequences()
    real = mask.astype(bool)
    model = models.load(tmp_path / "one")
    models.save(model, tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again", attn_implementation="eager")
    for written in (oracle, again):
        written = written.base_model
        with torch.no_grad():
            expected = written(
                torch.tensor(tokens),
                attention_mask=torch.tensor(mask),
                position_ids=(torch.tensor(mask).cumsum(1) - 1).clamp(min=0),
            ).last_hidden_state.numpy()
        np.testing.assert_allclose(
            model(tokens, mask)[real], expected[real], atol=TOLERANCE
        )


@ONE_OF_EACH
def test_gradients_agree_with_transformers(checkpoint, agree_in_gradients):
    path, oracle = checkpoint
    model = models.load(path)
    tokens, mask = sequences()
    mask[:] = 1
    # torch gives the row of padding no gradient from the input.
    tokens[tokens == oracle.get_input_embeddings().padding_idx] = 50

    def loss(model):
        logits = jax.nn.log_softmax(model(tokens, mask)[:, :-1])
        return -jnp.take_along_axis(logits, tokens[:, 1:, None], -1).mean()

    oracle.zero_grad()
    oracle(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()
    agree_in_gradients(model, nnx.jit(nnx.grad(loss))(model), oracle, TOLERANCE)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_absent_attributes_have_the_values_of_transformers(family):
    """And all attributes that transformers writes are known."""
    written = transformers.AutoConfig.for_model(family).to_dict()
    family, silent = models.FAMILIES[family], {"model_type": family}
    expected = family.spec(read_config(written, family, "written"))
    assert family.spec(read_config(silent, family, "silent")) == expected


@ONE_OF_EACH
def test_greedy_generation_agrees_with_transformers(checkpoint):
    path, oracle = checkpoint
    tokens, mask = sequences()
    mask[1] = 1  # transformers continues right padding as if it were text
    found = models.generate(models.load(path), tokens, mask, max_new_tokens=12)
    expected = oracle.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=12, do_sample=False, pad_token_id=0
        ),
    )
    np.testing.assert_array_equal(found, expected.numpy())
