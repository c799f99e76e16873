"""The old container of torch: a zip of raw storages and a pickle that names them.

The only file of the package that imports torch, inside the one function that needs it.
The pickle is read by torch's restricted unpickler (`weights_only=True`), which builds
tensors and calls nothing else; storages stay mapped (`mmap=True`).
"""

import pathlib
import zipfile

from jaxling.checkpoints.tensors import (
    DTYPES,
    LONGEST_JSON,
    MOST_TENSORS,
    CheckpointError,
    Stored,
    mapped,
    short,
)


def tensors(path: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of one file, as views of it.

    Raises:
      ImportError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a pickle of torch, which is needed to read it: pip install"
            " jaxling[torch]. Many repositories hold a safetensors copy in a pull"
            " request: --revision=refs/pr/N."
        ) from error
    _check_zip(path, len(mapped(path)))
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises nearly any kind on a damaged pickle
        first = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path} holds something else than tensors, or is damaged; it was not"
            f" loaded: {short(first)}"
        ) from error
    if not isinstance(loaded, dict) or len(loaded) > MOST_TENSORS:
        raise CheckpointError(f"{path} does not hold a dict of tensors.")
    found = {}
    for name, tensor in loaded.items():
        where = f"{path}: tensor {short(name)}"
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{where} is not a named tensor.")
        named = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided or named not in DTYPES:
            raise CheckpointError(f"{where} is stored in a way not known, {named}.")
        size = tensor.numel() * tensor.element_size()
        if size > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{where} of shape {list(tensor.shape)} needs {size} bytes; its storage"
                f" has {tensor.untyped_storage().nbytes()}."
            )
        # A tensor that is not contiguous is rare, and copied here.
        flat = tensor.detach().contiguous().reshape(-1)
        piece = flat.view(torch.uint8).numpy().view(DTYPES[named])
        piece.flags.writeable = False
        found[name] = Stored(tuple(tensor.shape), DTYPES[named], (piece,))
    return found


def _check_zip(path: pathlib.Path, size: int) -> None:
    """Refuses what torch would inflate: entries are to lie in the file as they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is damaged, or older than torch 1.6 and to be converted to"
            f" safetensors first: {short(str(error))}"
        ) from error
    for entry in entries:
        pickle = entry.filename.endswith(".pkl")
        if (
            entry.compress_type != zipfile.ZIP_STORED
            or entry.file_size != entry.compress_size
            or entry.file_size > (LONGEST_JSON if pickle else size)
        ):
            raise CheckpointError(
                f"{path}: entry {short(entry.filename)} is compressed or longer than"
                " the file."
            )
