"""What a study may use of a machine."""

from dataclasses import dataclass
from pathlib import Path

from relex.files.block_cache import BlockCache
from relex.progress import Tell


@dataclass(frozen=True)
class Resources:
    """Memory in bytes and threads for reading and combining; where what was measured is kept; who hears of progress.

    `blocks` is where what is read from a URL is kept meanwhile.
    """

    memory: int
    threads: int
    cache: Path
    blocks: BlockCache | None = None
    tell: Tell | None = None

    @property
    def grams(self) -> Path:
        """Where the Gram matrices of runs are kept."""
        return self.cache / "grams"
