"""Publish: a model and its card as one commit of a repository of the Hub, there as a whole or not at all."""

import re
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from flows.errors import ExportError

HUB = "hf://"
CARD = "README.md"

_REPOSITORY = re.compile(r"hf://([\w.-]+/[\w.-]+)")
# A shard of a model that lay there before would be read as one of this model's.
_WEIGHTS = (".safetensors", ".safetensors.index.json")


def publish(directory: Path, card: str, location: str, *, title: str) -> str:
    """Commit the files of `directory` and the card to `hf://org/repo`, and return the address of the commit.

    A repository that is not there is made, private; of one that is, what the model does not have stays but for weights.
    ExportError where the location is written otherwise, where the Hub does not let us in, and where it does not answer.
    """
    match = _REPOSITORY.fullmatch(location.rstrip("/"))
    if match is None:
        raise ExportError(f"{location} is not written as {HUB}ORG/NAME.")
    files = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    api = HfApi()
    try:
        api.create_repo(match[1], private=True, exist_ok=True)
        there = api.list_repo_files(match[1])
        stale = [CommitOperationDelete(name) for name in there if name.endswith(_WEIGHTS) and name not in files]
        added = [CommitOperationAdd(name, path) for name, path in files.items()]
        added.append(CommitOperationAdd(CARD, card.encode()))
        commit = api.create_commit(match[1], [*added, *stale], commit_message=title)
    except (OSError, httpx2.HTTPError) as error:
        # What the Hub says may hold a signed address.
        said = f"HTTP {error.response.status_code}" if isinstance(error, HfHubHTTPError) else type(error).__name__
        raise ExportError(
            f"{location} was not written ({said}): nothing of it is there. Check the name and the network, and log in"
            " as somebody who may write there: hf auth login."
        ) from None
    return str(commit.commit_url)
