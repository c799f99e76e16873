"""Configs as they are published are understood; those that cannot be meant are not."""

import pytest

from jaxling import models
from jaxling.checkpoints import CheckpointError
from jaxling.models.config import abstract, read_config

# What stands in almost every file.
COMMON = dict(
    _name_or_path="somewhere",
    architectures=["SomeModel"],
    bos_token_id=0,
    eos_token_id=[1, 106],
    pad_token_id=1,
    torch_dtype="float32",
    transformers_version="4.30.0",
    use_cache=True,
    initializer_range=0.02,
    attention_dropout=0.1,
)
LLAMA3_ROPE = dict(
    factor=32.0,
    high_freq_factor=4.0,
    low_freq_factor=1.0,
    original_max_position_embeddings=8192,
    rope_type="llama3",
)
BERT = dict(
    attention_probs_dropout_prob=0.1,
    gradient_checkpointing=False,
    hidden_act="gelu",
    hidden_dropout_prob=0.1,
    hidden_size=768,
    intermediate_size=3072,
    num_attention_heads=12,
    num_hidden_layers=12,
)
BART = dict(
    activation_dropout=0.0,
    d_model=1024,
    decoder_attention_heads=16,
    decoder_ffn_dim=4096,
    decoder_layerdrop=0.0,
    decoder_layers=12,
    decoder_start_token_id=2,
    encoder_attention_heads=16,
    encoder_ffn_dim=4096,
    encoder_layerdrop=0.0,
    encoder_layers=12,
    init_std=0.02,
    is_encoder_decoder=True,
    max_length=200,
    max_position_embeddings=1024,
    num_hidden_layers=12,
    scale_embedding=True,
)
T5 = dict(
    d_ff=1024,
    d_kv=64,
    d_model=512,
    decoder_start_token_id=0,
    dropout_rate=0.1,
    initializer_factor=1.0,
    is_encoder_decoder=True,
    layer_norm_epsilon=1e-06,
    num_heads=6,
    num_layers=8,
    relative_attention_num_buckets=32,
)

# The attributes of well-known repositories, with all that is odd in them.
PUBLISHED = {
    "bert-base-multilingual-cased": BERT
    | dict(
        model_type="bert",
        directionality="bidi",
        layer_norm_eps=1e-12,
        max_position_embeddings=512,
        pooler_fc_size=768,
        pooler_num_attention_heads=12,
        pooler_num_fc_layers=3,
        pooler_size_per_head=128,
        pooler_type="first_token_transform",
        position_embedding_type="absolute",
        vocab_size=119547,
    ),
    "xlm-roberta-base": BERT
    | dict(
        model_type="xlm-roberta",
        layer_norm_eps=1e-05,
        max_position_embeddings=514,
        output_past=True,
        type_vocab_size=1,
        vocab_size=250002,
    ),
    "distilgpt2": dict(
        model_type="gpt2",
        _num_labels=1,
        attn_pdrop=0.1,
        embd_pdrop=0.1,
        id2label={"0": "LABEL_0"},
        n_ctx=1024,
        n_embd=768,
        n_head=12,
        n_layer=6,
        resid_pdrop=0.1,
        summary_activation=None,
        summary_first_dropout=0.1,
        summary_proj_to_labels=True,
        summary_type="cls_index",
        summary_use_proj=True,
        task_specific_params={"text-generation": {"do_sample": True}},
    ),
    "pythia-70m": dict(
        model_type="gpt_neox",
        hidden_size=512,
        intermediate_size=2048,
        num_attention_heads=8,
        num_hidden_layers=6,
        rotary_emb_base=10000,
        rotary_pct=0.25,
        tie_word_embeddings=False,
        use_parallel_residual=True,
        classifier_dropout=0.1,
        vocab_size=50304,
    ),
    "bloom-560m": dict(
        model_type="bloom",
        apply_residual_connection_post_layernorm=False,
        attention_softmax_in_fp32=True,
        bias_dropout_fusion=True,
        hidden_dropout=0.0,
        masked_softmax_fusion=True,
        n_embed=1024,
        n_inner=None,
        n_layer=24,
        num_attention_heads=16,
        offset_alibi=100,
        pretraining_tp=1,
        skip_bias_add=True,
        skip_bias_add_qkv=False,
        seq_length=2048,
        vocab_size=250880,
    ),
    "xglm-564M": dict(
        model_type="xglm",
        activation_dropout=0,
        attention_heads=16,
        d_model=1024,
        decoder_start_token_id=2,
        ffn_dim=4096,
        init_std=0.02,
        layerdrop=0.0,
        num_layers=24,
        scale_embedding=True,
    ),
    "llama-7b": dict(model_type="llama", max_sequence_length=2048),
    "Llama-2-7b-hf": dict(
        model_type="llama",
        max_position_embeddings=4096,
        num_key_value_heads=32,
        pretraining_tp=1,
        rope_scaling=None,
    ),
    "Llama-3.2-1B": dict(
        model_type="llama",
        head_dim=64,
        hidden_size=2048,
        mlp_bias=False,
        num_key_value_heads=8,
        rope_scaling=LLAMA3_ROPE,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    ),
    "Mistral-7B-v0.3": dict(model_type="mistral", head_dim=128, sliding_window=None),
    "Qwen2.5-0.5B": dict(
        model_type="qwen2",
        hidden_size=896,
        max_window_layers=24,
        num_attention_heads=14,
        num_hidden_layers=24,
        num_key_value_heads=2,
        sliding_window=32768,
        tie_word_embeddings=True,
        use_mrope=False,
        use_sliding_window=False,
    ),
    "Qwen3-0.6B": dict(
        model_type="qwen3",
        head_dim=128,
        num_hidden_layers=28,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=None,
    ),
    "OLMo-1B-hf": dict(
        model_type="olmo",
        attention_bias=False,
        clip_qkv=None,
        pretraining_tp=1,
        tie_word_embeddings=True,
    ),
    "OLMo-2-1124-7B": dict(model_type="olmo2", rope_theta=500000, vocab_size=100352),
    "gemma-2-2b": dict(
        model_type="gemma2",
        cache_implementation="hybrid",
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
    ),
    "gemma-3-1b-it": dict(
        model_type="gemma3_text",
        cache_implementation="hybrid",
        rope_local_base_freq=10000,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=512,
        sliding_window_pattern=6,
    ),
    "t5-small": T5
    | dict(
        model_type="t5",
        n_positions=512,
        output_past=True,
        task_specific_params={"summarization": {"prefix": "summarize: "}},
    ),
    "mt5-small": T5
    | dict(
        model_type="mt5",
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        tokenizer_class="T5Tokenizer",
    ),
    "umt5-small": T5
    | dict(
        model_type="umt5",
        dense_act_fn="gelu_new",
        feed_forward_proj="gated-gelu",
        is_gated_act=True,
        scalable_attention=True,
        tie_word_embeddings=False,
    ),
    "mbart-large-50-many-to-many-mmt": BART
    | dict(
        model_type="mbart",
        _num_labels=3,
        add_bias_logits=False,
        add_final_layer_norm=True,
        classif_dropout=0.0,
        early_stopping=True,
        forced_eos_token_id=2,
        normalize_before=True,
        normalize_embedding=True,
        num_beams=5,
        output_past=True,
        static_position_embeddings=False,
        vocab_size=250054,
    ),
    "nllb-200-distilled-600M": BART
    | dict(
        model_type="m2m_100",
        activation_function="relu",
        tokenizer_class="NllbTokenizer",
        vocab_size=256206,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood(name):
    config = COMMON | PUBLISHED[name]
    family = models.FAMILIES[config["model_type"]]
    model = abstract(config, family, name)
    assert model.config == config


def refused(message, **config):
    family = models.FAMILIES[config["model_type"]]
    with pytest.raises(CheckpointError, match=message):
        abstract(config, family, "config")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
        ({"num_key_value_heads": -4}, "num_key_value_heads is -4"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"head_dim": 7}, "of heads of size 7, 7 cannot be rotated"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not handled"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5 is not handled",
        ),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0}},
            "rope factor 0.0 is out of range",
        ),
        ({"residual_scale": 0.0}, "residual_scale = 0.0 is not handled"),
        ({"residual_scale": 0}, "residual_scale = 0 is not handled"),
    ],
)
def test_values_that_cannot_be_meant_are_named(change, message):
    refused(message, model_type="llama", **change)


def test_values_of_one_family_that_cannot_be_meant():
    refused("clip_qkv is '8'", model_type="olmo", clip_qkv="8")
    refused("0 cannot be rotated", model_type="gpt_neox", rotary_pct=0.001)
    refused(
        "rope parameters 'x' are not named values",
        model_type="gemma3_text",
        rope_parameters={"full_attention": "x", "sliding_attention": {}},
    )


def test_old_and_new_spellings_of_gemma_3_are_one():
    family = models.FAMILIES["gemma3_text"]
    old = dict(
        num_hidden_layers=4,
        sliding_window_pattern=2,
        rope_theta=5000.0,
        rope_local_base_freq=300.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    new = dict(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=5000.0),
            "sliding_attention": dict(rope_type="default", rope_theta=300.0),
        },
    )
    old, new = (family.spec(read_config(c, family, "config")) for c in (old, new))
    assert old == new


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "mt5", "mbart", "m2m_100"])
def test_what_is_built_is_tied_as_the_config_says(kind):
    family = models.FAMILIES[kind]
    for tied in (False, True):
        config = {"model_type": kind, "tie_word_embeddings": tied}
        model = abstract(config, family, "config")
        assert (model.unembedding is None) == tied
