"""The lens kernel against dense float64 logits."""

import numpy as np
import pytest

from jaxling import kernels


def lens_oracle(hidden, unembed, bias, targets):
    """Every quantity from the full logits, in float64."""
    logits = np.einsum("lnd,vd->lnv", *(x.astype("d") for x in (hidden, unembed)))
    logits = logits + bias
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    log_p = logits - log_sum[..., None]
    p = np.exp(log_p)
    target = np.broadcast_to(targets[None, :, None], (*logits.shape[:2], 1))
    own = np.take_along_axis(logits, target, -1)
    return {
        "log_sum_exp": log_sum,
        "entropy": -(p * log_p).sum(-1),
        "kl_to_final": (p[-1] * (log_p[-1] - log_p)).sum(-1),
        "top_tokens": np.argsort(-logits, -1, kind="stable"),
        "target_ranks": (logits > own).sum(-1, keepdims=True),
        "target_log_probs": own - log_sum[..., None],
    }


@pytest.mark.parametrize("vocab, tile, block", [(1000, 256, 8), (1000, 100, 64)])
def test_every_quantity_matches_the_dense_oracle(rng, vocab, tile, block):
    hidden = rng.normal(size=(3, 37, 32)).astype("f")
    unembed = rng.normal(size=(vocab, 32)).astype("f")
    bias = rng.normal(size=vocab).astype("f")
    targets = rng.integers(0, vocab, 37)
    found = kernels.project_layers(
        *(hidden, unembed),
        **dict(bias=bias, k=5, entropy=True, divergence=True, targets=targets),
        **dict(tile=tile, block=block),
    )
    expected = lens_oracle(hidden, unembed, bias, targets)
    for name in ("log_sum_exp", "entropy", "kl_to_final", "target_log_probs"):
        # Logits near 20 summed in float32: 1e-6 of that, over a thousand terms.
        np.testing.assert_allclose(getattr(found, name), expected[name], atol=5e-5)
    np.testing.assert_array_equal(found.top_tokens, expected["top_tokens"][..., :5])
    np.testing.assert_array_equal(found.target_ranks, expected["target_ranks"])
