"""The safetensors container: a JSON header of offsets, then bytes.

https://github.com/huggingface/safetensors#format. The header is walked here rather than
through the package because a tensor must come as a view of the mapped file, in any
dtype, and because every way in which a header can lie must be named.
"""

import pathlib

from jaxling.checkpoints.tensors import (
    DTYPES,
    LONGEST_JSON,
    MOST_TENSORS,
    CheckpointError,
    Stored,
    checked_shape,
    mapped,
    parse_object,
    short,
)

NAMES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


def tensors(path: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of one file, as views of it.

    As the format demands, the tensors must cover the file without gap or overlap.
    """
    content = mapped(path)
    if len(content) < 8:
        raise CheckpointError(f"{path} is truncated: {len(content)} bytes.")
    length = int(content[:8].view("<u8")[0])
    if length > min(LONGEST_JSON, len(content) - 8):
        raise CheckpointError(
            f"{path} claims a header of {length} bytes; the file has {len(content)} and"
            f" the format allows {LONGEST_JSON}. It is truncated or not safetensors."
        )
    header = parse_object(content[8 : 8 + length].tobytes(), f"{path}: its header")
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        raise CheckpointError(f"{path} lists {len(header)} tensors: too many.")
    data = content[8 + length :]
    found, spans = {}, []
    for name, entry in header.items():
        where = f"{path}: tensor {short(name)}"
        if not isinstance(entry, dict):
            raise CheckpointError(f"{where} is described by {short(entry)}.")
        named, offsets = entry.get("dtype"), entry.get("data_offsets")
        if not isinstance(named, str) or named not in NAMES:
            raise CheckpointError(f"{where} has an unknown dtype, {short(named)}.")
        if (
            not isinstance(offsets, list)
            or len(offsets) != 2
            or not all(type(offset) is int for offset in offsets)
            or not 0 <= offsets[0] <= offsets[1]
        ):
            raise CheckpointError(f"{where}: {short(offsets)} are not offsets.")
        start, stop = offsets
        if stop > len(data):
            raise CheckpointError(
                f"{where} ends at byte {stop} of the data, of which the file holds"
                f" {len(data)}: it is truncated or its header is wrong."
            )
        dtype = DTYPES[NAMES[named]]
        shape, size = checked_shape(entry.get("shape"), dtype, where)
        if size != stop - start:
            raise CheckpointError(
                f"{where} of shape {list(shape)} and dtype {named} needs {size} bytes;"
                f" its offsets span {stop - start}."
            )
        found[name] = Stored(shape, dtype, (data[start:stop].view(dtype),))
        spans.append((start, stop, name))
    reached = 0
    for start, stop, name in sorted(spans):
        if start != reached:
            raise CheckpointError(
                f"{path}: tensor {short(name)} begins at byte {start} of the data, not"
                f" at {reached}: tensors overlap or leave a gap."
            )
        reached = stop
    if reached != len(data):
        raise CheckpointError(
            f"{path} holds {len(data) - reached} bytes after its last tensor."
        )
    return found
