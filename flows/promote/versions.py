"""What is registered under a name, as a person asks for it: every version with its numbers, and whether it is whole."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from deploy import champions, registry
from deploy.audit import Entry
from deploy.errors import CandidateError
from deploy.registry import RegisteredModelVersion
from deploy.tracking import local_path
from deploy.versions import OVERTAKEN
from deploy.wishes import Wish
from flows.promote.promotion import Promotion


@dataclass(frozen=True)
class ListedVersion:
    """One registered prediction; `state` says whether its weights are what was registered.

    `promoted` is its version of the registered model itself, None while it was never promoted.
    """

    row: RegisteredModelVersion
    state: str
    promoted: int | None

    @property
    def overtaken(self) -> str:
        """Return by which real step it is beaten, and by how many points; "" where none is known to beat it."""
        return self.row.tags.get(OVERTAKEN, "")

    @property
    def gate(self) -> str:
        """Return accuracy on the gate and, by what it was compared with, the difference and its lower bound."""
        numbers = self.row.metrics
        if "gate_accuracy" not in numbers:
            return ""
        compared = [
            f"{role.replace('_', ' ')} {numbers[f'gate_{role}_difference']:+.4f} ≥ {bound:+.4f}"
            for role, bound in sorted(_bounds(self.row).items())
        ]
        return ", ".join([f"{numbers['gate_accuracy']:.4f}", *compared])


@dataclass(frozen=True)
class ModelVersions:
    """Every registered prediction of `name`, newest first, the version that is champion, and how it came to be it.

    `waiting` was set on MLflow's own pages and is not judged yet.
    """

    name: str
    champion: int | None
    versions: tuple[ListedVersion, ...]
    trail: tuple[Entry, ...]
    waiting: tuple[Wish, ...] = ()

    @property
    def by_hand(self) -> list[str]:
        """Return what came of all that was set in MLflow since the champion became it, and what waits."""
        moved = [entry.number for entry in self.trail if entry.moved]
        since = [entry for entry in self.trail if entry.number >= max(moved, default=0) and entry.asked]
        newest = {entry.asked: entry for entry in since if entry.finished and entry.verdict != "abandoned"}
        return [Promotion(self.name, entry).sentence for entry in newest.values()] + [
            f"{wish.title} is set as champion in MLflow and not judged yet: relex up and relex serve do that within a"
            f" minute, relex promote {self.name} at once."
            for wish in self.waiting
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def list_versions(
    name: str, *, tracking_uri: str, downloads: Path, contents: Literal["read", "sizes"] = "sizes"
) -> ModelVersions:
    """Look at what is registered; with "read" every byte of the weights is compared with what was registered.

    Of remote weights nothing is said unless they are to be read, which brings them to `downloads`.
    """
    champion = registry.champion(name, tracking_uri=tracking_uri)
    trail = champions.history(name, tracking_uri=tracking_uri)
    promoted = {entry.digest: entry.to_version for entry in trail if entry.moved}

    def look(row: RegisteredModelVersion) -> ListedVersion:
        state = "remote, not read"
        if contents == "read" or local_path(row.weights) is not None:
            try:
                registry.verified(row, tracking_uri=tracking_uri, downloads=downloads, contents=contents)
                state = "verified" if contents == "read" else "sizes match"
            except CandidateError as error:
                state = f"damaged: {error}"
        return ListedVersion(row, state, promoted.get(row.digest))

    rows = registry.models(name, tracking_uri=tracking_uri)
    waiting = champions.pending(name, tracking_uri=tracking_uri)
    standing = None if champion is None else champion.version
    return ModelVersions(name, standing, tuple(map(look, rows)), tuple(trail), tuple(waiting))


def _bounds(row: RegisteredModelVersion) -> dict[str, float]:
    return {
        key.removeprefix("gate_").removesuffix("_lower_bound"): value
        for key, value in row.metrics.items()
        if key.endswith("_lower_bound")
    }
