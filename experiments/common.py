"""What every experiment shares: flags, the work directory and its record.

A flag has one meaning in all scripts. One that two scripts use is defined here.
"""

import importlib.metadata
import json
import logging as py_logging
import math
import os
import pathlib
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from absl import app, flags, logging

MODEL = flags.DEFINE_string(
    "model", "demo", "A built-in model (demo, demo-small), a directory, or a hub id."
)
REVISION = flags.DEFINE_string("revision", None, "Branch, tag, commit or refs/pr/N.")
TENSOR = flags.DEFINE_string(
    "tensor", None, "Name of the embedding tensor, where the family is unknown."
)
SHARED_WITH = flags.DEFINE_list(
    "shared_with", [], "Keep only tokens that these tokenizers have too (ids or paths)."
)
MODELS = flags.DEFINE_list(
    "models",
    ["demo-small"],
    "Further models, to compare with that of --model; none where only that is given.",
)
K = flags.DEFINE_integer(
    "k", None, "Neighbours of each row; the experiment's own number when not given.", 1
)
CENTER = flags.DEFINE_bool("center", False, "Take each space's mean away first.")
PARALLEL = flags.DEFINE_string(
    "parallel", None, "TSV of parallel texts, a column a language; built-in if none."
)
PER_LANGUAGE = flags.DEFINE_integer(
    "per_language", None, "Texts of each language; the experiment's own if none.", 2
)
LANGUAGES = flags.DEFINE_list("languages", [], "Which languages; all when not given.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random.", 0)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where results go; runs/<experiment> when not given, with the name of a --model.",
)

DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Share the work with the other processes of this job, as SLURM, Open MPI, a TPU pod"
    " or Kubernetes tell them; or as the three flags below do.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Address and port of process 0, where nothing else tells."
)
PROCESS_COUNT = flags.DEFINE_integer(
    "process_count", None, "How many processes meet there.", 1
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this one.", 0)

LEXICON = flags.DEFINE_list(
    "lexicon",
    [],
    "Dictionaries of the word-translation task, source-target:path in the format of"
    " MUSE, or a .tsv with a column for each language; the demo's when not given.",
)
WORD_LISTS = flags.DEFINE_list(
    "word_lists",
    [],
    "Ask only about words in these files, one a line, as code:path (the paper: English"
    " nouns, verbs and adjectives).",
)
NAMES = flags.DEFINE_list(
    "names", [], "What prompts call the languages of --lexicon, as code:name."
)
TASK = flags.DEFINE_string(
    "task", None, "A word-translation task that was saved, instead of --lexicon."
)
HARD = flags.DEFINE_bool(
    "hard", False, "Distractors are the nearest words, not random ones."
)
WORDS = flags.DEFINE_integer("words", 12, "Words of each ordered pair.", 1)
SHOTS = flags.DEFINE_integer("shots", 5, "Examples in a prompt.", 0)
DRAWS = flags.DEFINE_integer("draws", 5, "Prompts of each item, examples redrawn.", 1)
LANGUAGE_TOKENS = flags.DEFINE_list(
    "language_tokens",
    [],
    "Of a translation model, as code:token (eng:eng_Latn); its prompt is then the word"
    " alone.",
)

CORPUS = flags.DEFINE_list(
    "corpus", [], "Files, directories, globs or URLs; the built-in text if none."
)
CORPUS_FORMAT = flags.DEFINE_enum(
    "corpus_format",
    None,
    ["jsonl", "parquet", "text", "tokens"],
    "What is in the files of --corpus, where their names do not tell.",
)
TEXT_FIELD = flags.DEFINE_string(
    "text_field", "text", "Where a record of --corpus has its text; a.b for b in a."
)
END_TOKEN = flags.DEFINE_integer(
    "end_token", None, "Closes each document of a .npy of token ids.", 0
)
TOKEN_TYPE = flags.DEFINE_enum(
    "token_type",
    None,
    ["uint16", "uint32", "int32", "int64"],
    "Of the ids in files of --corpus or --tokens that hold nothing else, without a"
    " header.",
)
MATCH_TOKENS = flags.DEFINE_bool(
    "match_tokens", False, "Look for words as tokens, not as text between boundaries."
)
STRICT = flags.DEFINE_bool("strict", False, "Stop at the first damaged record.")
PROCESSES = flags.DEFINE_integer(
    "processes", None, "How many count; one for each processor when not given.", 1
)
DASK = flags.DEFINE_string(
    "dask", None, "Address of a Dask scheduler that counts, instead of processes."
)


SILENT = 100  # seconds after which a process that says nothing counts as dead

# On results: they are no part of a run's record, and may differ when it is resumed.
_WITHOUT_EFFECT = {
    *("workdir", "processes", "dask"),
    *("distributed", "coordinator", "process_count", "process_id"),
}


class Run(NamedTuple):
    """A started experiment: where it writes, and when it began."""

    workdir: pathlib.Path
    started: float


def models() -> list[str]:
    """That of `--model`, and the others of `--models`, each once.

    The default of `--models` goes with that of `--model`: nobody who names a model
    finds a built-in one in the pictures without having asked for it.
    """
    others = MODELS.value
    if flags.FLAGS["models"].using_default_value and MODEL.value != MODEL.default:
        others = []
    return list(dict.fromkeys([MODEL.value, *others]))


def refuse(names: Iterable[str], instead: str) -> None:
    """Raises ValueError where a flag of `names` is given, which has no meaning here."""
    for name in names:
        if not flags.FLAGS[name].using_default_value:
            raise ValueError(f"--{name} has no meaning here: {instead}")


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes `content` so that the file is either the old one or complete."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(_plain(content), file, indent=2, ensure_ascii=False, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _plain(content: Any) -> Any:
    """`content` as JSON has it: NumPy's numbers as numbers, NaN and infinity null."""
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if hasattr(content, "tolist"):
        return _plain(content.tolist())
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def join_processes() -> tuple[int, int]:
    """Number and count of the processes of this job; (0, 1) where it is alone.

    To be called before anything is computed. Process 0 writes the results.

    Raises:
      ValueError: the flags do not fit each other, or the processes did not meet.
    """
    given = COORDINATOR.value, PROCESS_COUNT.value, PROCESS_ID.value
    if given == (None, None, None) and not DISTRIBUTED.value:
        return 0, 1
    if None in given and given != (None, None, None):
        raise ValueError("--coordinator, --process_count and --process_id go together.")
    import jax

    # The others of a job finish and save their share when one of them dies.
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=SILENT)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            "The processes of this job did not meet; where no cluster is detected, give"
            f" --coordinator, --process_count and --process_id. ({error})"
        ) from error
    return jax.process_index(), jax.process_count()


def begin(
    experiment: str, inputs: dict[str, Any] | None = None, *, write: bool = True
) -> Run:
    """Makes the work directory and writes `config.json`: all flags, versions, inputs.

    `inputs` names what was read (hashes of tensors, paths of data). A directory that
    holds more than the record of a run with other flags or inputs is refused. Of
    several processes all look and one writes.

    Raises:
      ValueError: the directory was made with other flags or inputs.
      OSError: the directory cannot be written.
    """
    workdir = pathlib.Path(WORKDIR.value or _default_workdir(experiment))
    workdir.mkdir(parents=True, exist_ok=True)
    names = {
        flag.name
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if not module.startswith("absl.")
        for flag in defined
    }
    values = {name: flags.FLAGS[name].value for name in sorted(names - _WITHOUT_EFFECT)}
    config = {
        "experiment": experiment,
        "flags": values,
        "inputs": inputs or {},
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name)
                for name in ("jax", "jaxlib", "flax", "numpy", "transformers")
            },
        },
    }
    path = workdir / "config.json"
    if any(other != path for other in workdir.iterdir()) and path.exists():
        try:
            before = json.loads(path.read_text("utf-8"))
        except ValueError:
            before = {}
        before = before if isinstance(before, dict) else {}
        for part in ("experiment", "flags", "inputs"):
            new = json.loads(json.dumps(config[part]))
            if before.get(part) != new and before:
                raise ValueError(
                    f"{workdir} holds a run with other {part}:"
                    f" {_difference(before.get(part), new)}. Choose another"
                    " --workdir, or remove that one."
                )
    if write:
        write_json(path, config)
    return Run(workdir, time.time())


def _default_workdir(experiment: str) -> pathlib.Path:
    """So that one experiment on several models needs no --workdir."""
    if MODEL.value == MODEL.default:
        return pathlib.Path("runs", experiment)
    return pathlib.Path("runs", f"{experiment}-{pathlib.Path(MODEL.value).name}")


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(
            name
            for name in before.keys() | after.keys()
            if before.get(name) != after.get(name)
        )
        return ", ".join(
            f"{name} was {before.get(name)!r} and is now {after.get(name)!r}"
            for name in names
        )
    return f"was {before!r} and is now {after!r}"


def finish(
    run: Run, summary: dict[str, Any], measured: dict[str, Any] | None = None
) -> None:
    """Writes `summary.json` (what was found) and `run.json` (time, device, memory).

    `seconds` are those since `begin`, `process_seconds` those since the command began,
    and `processor_seconds` what all processors spent on it. `measured` joins
    `run.json`: whatever differs from one run to the next.
    """
    import jax

    write_json(run.workdir / "summary.json", summary)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    write_json(
        run.workdir / "run.json",
        {
            "seconds": round(time.time() - run.started, 3),
            "process_seconds": _age(),
            "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_memory_mib": round(usage.ru_maxrss / 1024),
            "devices": [str(device) for device in jax.devices()],
            "machine": platform.machine(),
            "processors": os.cpu_count(),
            **(measured or {}),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )
    logging.info("Record in %s", run.workdir)


def _age() -> float | None:
    """Seconds since this process began, imports included; None where none can tell."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2]
        began = int(fields.split()[19]) / os.sysconf("SC_CLK_TCK")
        return round(time.clock_gettime(time.CLOCK_BOOTTIME) - began, 1)
    except (OSError, AttributeError):
        return None


def entries(values: list[str], flag: str) -> dict[str, str]:
    """A dictionary from values `key:value` of a list flag.

    Raises:
      ValueError: a value without a colon.
    """
    for value in values:
        if ":" not in value:
            raise ValueError(f"--{flag} takes key:value; got {value!r}.")
    return dict(value.split(":", 1) for value in values)


def lexicons() -> tuple[dict, dict]:
    """Word pairs of `(source, target)`, for questions and for examples.

    Those of `--lexicon`, for both; or of the demo, between English and every other
    language and in two pairs without English: test concepts and training concepts.

    Raises:
      ValueError, OSError: a file cannot be read.
    """
    from jaxling import demo, dictionaries, word_translation
    from jaxling.demo import evaluation

    if LEXICON.value:
        test = train = word_translation.read_lexicons(LEXICON.value)
    else:
        test, train = (
            {pair: demo.lexicon(*pair, split) for pair in evaluation.ORDERED_PAIRS}
            for split in ("test", "train")
        )
    lists = {
        code: dictionaries.read_words(path)
        for code, path in entries(WORD_LISTS.value, "word_lists").items()
    }
    unknown = sorted(set(lists) - {code for pair in test for code in pair})
    if unknown:
        raise ValueError(f"--word_lists names {unknown}, which no lexicon has.")
    return word_translation.keep_words(test, lists), train


def translation_task(model: Any, tokenizer: Any) -> Any:
    """The `jaxling.word_translation.Task` that the flags describe.

    Raises:
      ValueError, OSError: as the functions of `jaxling.word_translation` do.
    """
    import numpy as np

    from jaxling import demo, word_translation

    if TASK.value:
        if LEXICON.value or HARD.value or WORD_LISTS.value:
            raise ValueError(
                "--task excludes --lexicon, --word_lists and --hard: it has its words."
            )
        return word_translation.load_task(TASK.value)
    asked, examples = lexicons()
    vectors = None
    if HARD.value:
        words = {(s, a) for (s, _), pairs in asked.items() for a, _ in pairs}
        vectors = word_translation.word_vectors(
            np.asarray(model.embedding[...]), tokenizer, sorted(words)
        )
    return word_translation.build_task(
        asked,
        demo.LANGUAGES | entries(NAMES.value, "names"),
        examples=examples,
        count=WORDS.value,
        vectors=vectors,
        seed=SEED.value,
    )


def shards() -> list:
    """The shards of `--corpus`; none where it is not given.

    Raises:
      ValueError, OSError, ImportError: as `jaxling.corpus.find_shards`.
    """
    from jaxling import corpus

    return corpus.find_shards(
        CORPUS.value,
        format=CORPUS_FORMAT.value,
        field=TEXT_FIELD.value,
        end_token=END_TOKEN.value,
        token_type=TOKEN_TYPE.value,
    )


def count(plan: Any, run: Run, built_in: Iterable[str]) -> Any:
    """The `jaxling.corpus.Counts` of `--corpus`, or of the built-in documents.

    Finished shards are kept in the work directory: the same command goes on from them.
    Damage is reported on standard error.

    Raises:
      ValueError: nothing of the corpus could be read.
      ValueError, OSError, ImportError: as the functions of `jaxling.corpus` do.
    """
    from jaxling import corpus

    if not CORPUS.value:
        return corpus.count_documents(built_in, plan)
    parts = shards()
    if DASK.value:
        try:
            import distributed
        except ImportError:
            raise ImportError(
                "--dask needs the extra `dask`: pip install 'jaxling[dask]'."
            ) from None

        with distributed.Client(DASK.value) as client:
            counts = corpus.count_on_dask(parts, plan, client, strict=STRICT.value)
    else:
        counts = corpus.count_corpus(
            parts,
            plan,
            workdir=run.workdir / "counts",
            processes=PROCESSES.value,
            strict=STRICT.value,
        ).counts
    damage = counts.damage
    if any(damage[:2]):
        logging.warning(
            "%d records were skipped and %d mended, such as: %s",
            damage.skipped,
            damage.mended,
            "; ".join(damage.examples[:3]),
        )
    if not counts.documents:
        raise ValueError(
            f"No document of --corpus could be counted: {damage.skipped:,} records were"
            f" skipped and {damage.empty:,} are empty."
            + "".join(f" The first: {example}." for example in damage.examples[:1])
        )
    return counts


def launch(main: Callable[[list[str]], None]) -> None:
    """Runs `main` under absl; bad input ends in one paragraph, not in a traceback.

    ValueError, OSError and ImportError (a missing extra) are the user's to mend:
    exit status 1. Anything else is a defect and keeps its traceback.
    """

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"Arguments without a flag name: {argv[1:]}")
        try:
            main(argv)
        except (ValueError, OSError, ImportError) as error:
            if logging.get_verbosity() >= logging.DEBUG:
                raise
            told = str(error)
            if isinstance(error, OSError) and error.filename and error.strerror:
                told = f"{error.filename}: {error.strerror}."
            print(f"error: {' '.join(told.split())}", file=sys.stderr)
            sys.exit(1)

    # Help shows the flags that scripts share beside the script's own.
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    # Neither is news: that there is no TPU, and no torch beside transformers.
    py_logging.getLogger("jax._src.xla_bridge").setLevel(py_logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    app.run(guarded)
