"""Formats that are recognised and not read: each is refused with the trainer's own way to export what is."""

from relex.errors import CheckpointIncompleteError
from relex.layouts.files import Directory


def refuse_known(directory: Directory) -> None:
    """Raise CheckpointIncompleteError, with the way out, when `directory` holds weights that are never read."""
    for name in directory.files():
        if name.endswith((".bin", ".pt", ".pth")):
            raise CheckpointIncompleteError(f"{directory}: {name} is not read: save with safetensors.")
