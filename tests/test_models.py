"""Decoders against transformers, layer by layer, on tiny random checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxling import models

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

# Noise of float32 products in another order; 1e-4 would be a defect.
TOLERANCE = 5e-5

SMALL = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    max_position_embeddings=64,
    eos_token_id=None,  # or transformers stops there
)
LLAMA_3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
CASES = {
    "llama": dict(
        model_type="llama",
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=LLAMA_3,
    ),
    "llama-tied-odd-heads": dict(
        model_type="llama",
        hidden_size=40,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=12,
        tie_word_embeddings=True,
    ),
}


@pytest.fixture(scope="session", params=CASES)
def checkpoint(request, tmp_path_factory):
    """A directory of several shards, and the torch model that wrote it."""
    values = {**SMALL, **CASES[request.param]}
    config = transformers.AutoConfig.for_model(**values)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms near one but not one; biases as large as what they are added to.
            parameter.normal_(float("norm" in name), 0.2)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path, model


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


def test_every_layer_and_the_logits_agree_with_transformers(checkpoint):
    path, oracle = checkpoint
    tokens, mask = sequences()
    logits, hidden = torch_run(oracle, tokens, mask)
    model = models.load(path)
    found, cache = model.run_with_cache(tokens, mask)
    real = mask.astype(bool)
    stream = [cache["hook_embed"], *cache["resid_post"][:-1]]
    stream.append(model.final_norm(cache["resid_post"][-1]))
    for ours, theirs in zip(stream, hidden, strict=True):
        np.testing.assert_allclose(ours[real], theirs[real], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(found[real], logits[real], atol=TOLERANCE, rtol=0)


def test_what_is_saved_transformers_loads_to_the_same_logits(checkpoint, tmp_path):
    path, oracle = checkpoint
    tokens, mask = sequences()
    models.save(models.load(path), tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    expected = torch_run(oracle, tokens, mask)[0]
    np.testing.assert_array_equal(torch_run(again, tokens, mask)[0], expected)


def test_gradients_reach_every_parameter(checkpoint):
    model = models.load(checkpoint[0])
    tokens, mask = sequences()

    def loss(model):
        logits = jax.nn.log_softmax(model(tokens, mask)[:, :-1])
        target = tokens[:, 1:, None]
        return -jnp.take_along_axis(logits, target, -1).mean()

    gradients = nnx.to_flat_state(nnx.state(nnx.grad(loss)(model)))
    for path, gradient in gradients:
        assert np.isfinite(gradient[...]).all(), path
        # Softmax is invariant to the part of a key's bias that is common to all keys,
        # but rotations make that part differ: no gradient is zero.
        assert np.abs(gradient[...]).max() > 0, path


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
