"""Look: one comparison at a gate, and the error it may spend of what all comparisons on these problems share.

Whoever decides again on the same problems, after an edit of the settings, at a later window or on more of the problems,
passes one by luck more often. So looks are on disk, and their errors add up to no more than 1 - confidence. Those that
were planned share PLANNED of it equally; each further one spends half of what is left, so that there is always some.
The same comparison again, of a decision that was killed or whose settings changed nothing, is the same look.

Gates that share a problem are one gate: a part of a benchmark gives no new error.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from evaluation.errors import ReportError
from evaluation.files import write_file
from evaluation.verdict.report import Report

# The share of the error for looks that were planned; the rest is for those that come after.
PLANNED = 0.8
# Hexadecimal digits of a problem's sha256: two of a million problems are alike with a chance of 1e-7.
_DIGITS = 16


@dataclass(frozen=True)
class Look:
    """The `number`-th look (from 1) at a gate, of an `error` of its own; `comparison` and `gate` are digests."""

    comparison: str
    gate: str
    benchmark: str
    number: int
    error: float


@dataclass(frozen=True)
class Looks:
    """All looks of one training run, or at one pair of models; `gates` has the problems of each gate by digest."""

    gates: dict[str, tuple[str, ...]]
    looks: tuple[Look, ...]


def spend(path: Path, reports: Sequence[Report], *, confidence: float, planned: int = 1) -> Look:
    """Return the look at which the first of `reports` is compared with the others, which is on disk in `path` first.

    `planned` looks share most of the error 1 - `confidence`. Raises ReportError where `path` holds something else.
    """
    # Who compares without counting looks does without it: a light installation lacks it.
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        before = read_looks(path)
        gate = reports[0]
        problems = tuple(problem[:_DIGITS] for problem, _ in gate.scores)
        digest = sha256(json.dumps(problems).encode()).hexdigest()[:_DIGITS]
        compared = [digest, *(report.model_digest for report in reports), dict(gate.settings), gate.metric]
        comparison = sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:_DIGITS]
        own = {other for other, theirs in before.gates.items() if not set(problems).isdisjoint(theirs)}
        earlier = [look for look in before.looks if look.gate in own]
        for look in earlier:
            if look.comparison == comparison:
                return look
        left = 1 - confidence - sum(look.error for look in earlier)
        error = PLANNED * (1 - confidence) / planned
        if len(earlier) >= planned or error > left:
            # A confidence that was raised since may have left nothing.
            error = max(0.0, left) / 2
        look = Look(comparison, digest, gate.benchmark, len(earlier) + 1, error)
        after = Looks({**before.gates, digest: problems}, (*before.looks, look))
        write_file(path, json.dumps(asdict(after), indent=1) + "\n")
        return look


def read_looks(path: Path) -> Looks:
    """Return the looks so far, none where there is no file; ReportError where it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        gates = {digest: tuple(problems) for digest, problems in content["gates"].items()}
        return Looks(gates, tuple(Look(**look) for look in content["looks"]))
    except FileNotFoundError:
        return Looks({}, ())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReportError(
            f"{path} cannot be read: {error}. It counts the looks at the gate: bring it back, or take a gate of other"
            " problems."
        ) from error
