"""What a model needs besides its weights: configuration and tokenizer, which are copied into a prediction."""

from fnmatch import fnmatch

from relex.files.directory import Directory

# Code is not in the list, and neither is what a trainer keeps for itself.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
)


def side_names(directory: Directory) -> list[str]:
    """Return the sorted names of such files in a model directory.

    Raises CheckpointMismatchError for one that may not be opened, or is too large for what it is called.
    """
    names = sorted(name for name in directory.files() if any(fnmatch(name, pattern) for pattern in SIDE_FILES))
    for name in names:
        directory.check(name)
    return names
