"""Where models come from: a built-in name, a directory, or the hub."""

import os
import pathlib
from collections.abc import Sequence

from jaxling.checkpoints.tensors import CheckpointError

BUILT_IN = ("demo", "demo-small")


def is_local(path_or_id: str | os.PathLike) -> bool:
    """Whether this names a built-in model or a directory, not a model of the hub."""
    return path_or_id in BUILT_IN or pathlib.Path(path_or_id).expanduser().is_dir()


def locate(
    path_or_id: str | os.PathLike,
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
) -> pathlib.Path:
    """The directory of a model, downloading what is not there yet.

    Args:
      path_or_id: `demo` or `demo-small` (built in), a directory, or a hub id. A
        directory that is called like a built-in model is written `./demo`.
      revision: of a hub id: branch, tag, commit, or `refs/pr/N`.
      patterns: of a hub id: the files to fetch, `*` allowed; all when None.

    The hub's cache and variables hold (`HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN`, ...);
    without a network, files that were fetched before are used.

    Raises:
      CheckpointError: neither is there, or the hub refuses.
    """
    name = os.fspath(path_or_id)
    if name in BUILT_IN:
        path = pathlib.Path(__file__).parents[1] / "demo" / "models" / name
        if not path.is_dir():
            raise CheckpointError(f"The built-in model {name!r} is not installed.")
        return path
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{name} is a file; a checkpoint is its directory.")
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import validate_repo_id

    about = f"{name!r} at revision {revision!r}" if revision else repr(name)
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{name!r} is neither a directory nor a hub id (owner/name)."
        ) from error
    try:
        snapshot = snapshot_download(
            name,
            revision=revision,
            allow_patterns=None if patterns is None else list(patterns),
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{about} is gated: accept its terms on the hub and set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"The hub has no revision {about}.") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{about} is no directory here and no model that the hub shows."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{about} is no directory here, is not in the hub's cache, and the hub"
            " cannot be reached (or HF_HUB_OFFLINE is set)."
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{about} cannot be fetched: {error}.") from error
    return pathlib.Path(snapshot)
