"""Samples: every answer of one evaluation with its problem, as lm-eval writes them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluation.errors import ReportError


def read_samples(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples of one evaluation, of all its filters; ReportError when they cannot be read."""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} cannot be read: {error}. Delete it and evaluate again.") from error
