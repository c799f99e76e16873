"""The pre-training script: a whole run from text, and one paragraph for bad input."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers
from absl import flags as absl_flags
from absl.testing import flagsaver

from jaxling import models, training
from jaxling.experiments import pretrain

CONFIG = dict(
    model_type="llama",
    vocab_size=13_000,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


@pytest.fixture(autouse=True)
def parsed():
    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS(["test"])


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture
def tokens(tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 300, 30).tolist() for _ in range(40)]
    return str(
        training.write_tokens(tmp_path / "tokens", rows, vocabulary_size=13_000).path
    )


def small(tmp_path, **flags):
    settings = dict(steps=6, rows=4, length=32, evaluate_every=3, snapshot_every=3)
    return flagsaver.flagsaver(
        **{"workdir": str(tmp_path / "run"), **settings, **flags}
    )


def test_a_run_leaves_its_record_its_picture_and_a_model(config, tokens, tmp_path):
    with small(tmp_path, config=config, tokens=[tokens], evaluate_on=[tokens]):
        pretrain.main([])
        pretrain.main([])  # again: it is finished, and says the same
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 6
    steps, losses = training.loss_curve(run)
    np.testing.assert_array_equal(steps, range(1, 7))
    assert summary["training_loss"] == losses[-1]
    assert (run / "loss.png").stat().st_size > 1000
    file = training.open_tokens(tokens)
    settings = training.Recipe(batch=4, length=32)
    exported = models.load(run / "model", dtype="float32")
    measured = training.evaluate(exported, file, settings)
    found = summary["evaluations"]["tokens"]
    np.testing.assert_allclose(measured.loss, found["loss"], rtol=1e-6)
    fresh = models.build(CONFIG, jax.random.key(0))
    before = training.evaluate(fresh, file, settings)
    np.testing.assert_allclose(before.loss, found["before"], rtol=1e-6)


def test_devices_share_the_rows(config, tokens, tmp_path):
    found = {}
    for parallel in (False, True):
        workdir = tmp_path / str(parallel)
        flags = dict(config=config, tokens=[tokens], rows=8, steps=2)
        with small(tmp_path, **flags, workdir=str(workdir), data_parallel=parallel):
            pretrain.main([])
        found[parallel] = training.loss_curve(workdir)[1]
    # Eight devices sum the gradients in another order.
    np.testing.assert_allclose(found[True], found[False], rtol=1e-5)


def test_weights_are_exported_in_the_dtype_asked_for(config, tokens, tmp_path):
    found = {}
    for dtype in ("float32", "bfloat16"):
        workdir = str(tmp_path / dtype)
        with small(
            tmp_path, config=config, tokens=[tokens], workdir=workdir, save_dtype=dtype
        ):
            pretrain.main([])
        file = tmp_path / dtype / "model" / "model.safetensors"
        found[dtype] = safetensors.numpy.load_file(file)
        written = json.loads((file.parent / "config.json").read_text())
        assert written["dtype"] == dtype
    for name, exact in found["float32"].items():
        np.testing.assert_array_equal(
            exact.astype(ml_dtypes.bfloat16), found["bfloat16"][name]
        )


TEXTS = ["In the beginning was the Word", "and the Word was with God"]


def gpt2_files(folder):
    """vocab.json and merges.txt alone, as old checkpoints have them."""
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pieces.pre_tokenizer.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(TEXTS * 20, trainer)
    pieces.model.save(str(folder))
    return {"vocab.json", "merges.txt"}


def sentencepiece_files(folder):
    """tokenizer.model alone."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=40,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return {"tokenizer.model"}


@pytest.fixture(params=["gpt2", "llama"])
def start(request, tmp_path):
    """A checkpoint, and the files of its tokenizer."""
    folder = tmp_path / "start"
    config = {**CONFIG, "vocab_size": 300}
    if request.param == "gpt2":
        sizes = dict(n_embd=8, n_layer=1, n_head=2, n_positions=64)
        config = dict(model_type="gpt2", vocab_size=300, **sizes)
    models.save(models.build(config, jax.random.key(0)), folder)
    (folder / "tokens.npy").write_bytes(b"no file of a tokenizer, though called so")
    make = gpt2_files if request.param == "gpt2" else sentencepiece_files
    return folder, make(folder)


def ids_of(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer([*TEXTS, "é was the Word unseen"])["input_ids"]


def test_text_that_changed_is_another_run(start, tmp_path):
    folder, _ = start
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS * 50))
    flags = dict(model=str(folder), documents=str(text), steps=1, rows=1, length=16)
    with small(tmp_path, **flags):
        pretrain.main([])
        text.write_text("\n".join(TEXTS * 51))
        with pytest.raises(ValueError, match="other inputs: documents was"):
            pretrain.main([])
        text.write_text("\n".join(TEXTS * 50))
        config = json.loads((folder / "config.json").read_text())
        models.save(models.build(config, jax.random.key(1)), folder)
        with pytest.raises(ValueError, match="other inputs: weights was"):
            pretrain.main([])


def test_all_text_is_read_where_another_is_evaluated(start, tokens, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS * 50))
    flags = dict(model=str(start[0]), documents=str(text), steps=1, rows=1, length=16)
    other = training.write_tokens(
        tmp_path / "a" / "tokens", [[1, 2]], vocabulary_size=9
    )
    names = [tokens, str(other.path)]
    with small(tmp_path, **flags, evaluate_on=names):
        pretrain.main([])
    read = training.open_tokens(tmp_path / "run" / "tokens")
    assert len(read.documents) - 1 == 100
    assert not (tmp_path / "run" / "held_out_tokens").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["evaluations"]) == sorted(names)


def test_one_line_of_text_leaves_nothing_to_keep(start, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[0])
    with small(tmp_path, model=str(start[0]), documents=str(text)):
        with pytest.raises(ValueError, match="has 1 documents.*two or more"):
            pretrain.main([])


def test_token_files_of_three_kinds_are_one_text(config, tokens, tmp_path):
    ids = np.arange(40, dtype=np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    ids.tofile(tmp_path / "ids.bin")
    flags = dict(config=config, steps=2)
    given = [tokens, str(tmp_path / "ids.npy")]
    with small(tmp_path, **flags, tokens=given):
        pretrain.main([])
    joined = training.open_tokens(tmp_path / "run" / "tokens").tokens
    expected = np.concatenate([training.open_tokens(tokens).tokens, ids])
    np.testing.assert_array_equal(joined, expected)
    found = training.open_tokens(tmp_path / "ids.bin", "uint16")
    np.testing.assert_array_equal(found.tokens, ids)
    with small(
        tmp_path, **flags, tokens=[str(tmp_path / "ids.bin")], token_type="uint16",
        workdir=str(tmp_path / "headless"),
    ):  # fmt: skip
        pretrain.main([])
    with pytest.raises(ValueError, match="ids.bin is no readable .npy") as caught:
        training.open_tokens(tmp_path / "ids.bin")
    assert "trust" not in str(caught.value)


def files_of_models():
    return {"config.json", "model.safetensors"}


def test_the_tokenizer_goes_where_the_model_goes(start, tmp_path):
    folder, files = start
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS * 50))
    flags = dict(model=str(folder), documents=str(text), steps=1, rows=1, length=16)
    with small(tmp_path, **flags):
        pretrain.main([])
    exported = tmp_path / "run" / "model"
    assert {path.name for path in exported.iterdir()} == files | files_of_models()
    assert ids_of(exported) == ids_of(folder)


def test_random_weights_take_the_tokenizer_that_is_named(
    start, config, tokens, tmp_path
):
    flags = dict(config=config, tokens=[tokens], steps=1, rows=1)
    exported = tmp_path / "run" / "model"
    with small(tmp_path, init=str(start[0]), **flags):
        pretrain.main([])
    # The config is a Llama's, whatever the tokenizer was made for.
    assert ids_of(exported) == ids_of(start[0])


def test_random_weights_and_a_token_file_have_no_tokenizer(config, tokens, tmp_path):
    with small(tmp_path, config=config, tokens=[tokens], steps=1, rows=1):
        pretrain.main([])
    exported = tmp_path / "run" / "model"
    assert {path.name for path in exported.iterdir()} == files_of_models()


def test_a_tokenizer_beyond_the_config_is_refused(config, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    path = tmp_path / "narrow.json"
    path.write_text(json.dumps({**CONFIG, "vocab_size": 12_287}))
    with small(tmp_path, config=str(path), documents=str(text)):
        with pytest.raises(ValueError, match="12288 tokens; the vocabulary of.*12287"):
            pretrain.main([])


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(steps=0), "`steps` must be at least 1; got 0"),
        (dict(length=65), "65 is longer than the 64 positions"),
        (dict(rates=["embedding"]), "pattern=factor,...; got 'embedding'"),
        (dict(rates=["embedding=slow"]), "pattern=factor"),
        (dict(rates=["nowhere=1"]), "'nowhere' is for no parameter"),
        (dict(documents="a.txt"), "Give --documents or --tokens, not both"),
        (dict(tokens=["nowhere"]), "no token file at nowhere"),
        (dict(config="nowhere.json"), "nowhere.json"),
        (dict(config=__file__), f"--config={__file__} is no JSON"),
        (dict(evaluate_every=-1), "`evaluate_every` must be at least 1"),
    ],
)
def test_bad_flags_are_one_paragraph(config, tokens, tmp_path, flags, message):
    with small(tmp_path, **{"config": config, "tokens": [tokens], **flags}):
        with pytest.raises((ValueError, OSError), match=message):
            pretrain.main([])


def test_lines_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"fine\n\n  two \n" + b"\xff\xfe\n")
    lines = training.lines_of(path)
    assert [next(lines), next(lines)] == ["fine", "two"]
    with pytest.raises(ValueError, match="text.txt is no UTF-8 text: line 4"):
        next(lines)


def test_the_olmo_recipe_is_one_flag_and_others_change_it(tmp_path):
    with flagsaver.flagsaver(recipe="olmo"):
        assert pretrain.recipe_of_flags() == training.OLMO
    with flagsaver.flagsaver(recipe="olmo", shuffle=True, seed=3):
        assert pretrain.recipe_of_flags() == training.OLMO._replace(seed=3)
    with flagsaver.flagsaver(shuffle=False, seed=3):
        assert pretrain.recipe_of_flags().seed is None
    with flagsaver.flagsaver(recipe="olmo", rows=64, rates=["embed=0"]):
        changed = training.OLMO._replace(batch=64, rates=(("embed", 0.0),))
        assert pretrain.recipe_of_flags() == changed
