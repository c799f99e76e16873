"""A directory or hub id becomes named, lazily read tensors, whatever the container.

    checkpoint = open_checkpoint("xlm-roberta-base")
    rows = checkpoint.read(checkpoint.input_embeddings(), rows=slice(0, 1000))

One room per container (`safetensors_files`, `msgpack_files`, `torch_files`); what they
share is in `tensors`, where models come from in `sources`, and which tensor is an
embedding in `embeddings`. Nothing in a checkpoint is executed or unpickled, and what it
claims is checked before it is believed: the answer is a `CheckpointError`.
"""

from jaxling.checkpoints.checkpoint import Checkpoint as Checkpoint
from jaxling.checkpoints.checkpoint import open_checkpoint as open_checkpoint
from jaxling.checkpoints.sources import locate as locate
from jaxling.checkpoints.tensors import CheckpointError as CheckpointError
