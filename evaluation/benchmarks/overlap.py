"""Overlap: do two benchmarks share problems? What chooses a candidate must not be what judges it."""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from evaluation.benchmarks.benchmark import Benchmark, resolve_benchmark
from evaluation.benchmarks.contents import Contents
from evaluation.child import last_log_line, run_child
from evaluation.digest import digest_value
from evaluation.errors import BenchmarkError, OverlapError


@dataclass(frozen=True)
class Overlap:
    """Two benchmarks, how many problems each has, and the beginnings of those that occur twice.

    `shared` are problems of the second that the first has too; `first_repeated` and `second_repeated` those that their
    own benchmark had before.
    """

    first: str
    second: str
    first_n: int
    second_n: int
    shared: tuple[str, ...]
    first_repeated: tuple[str, ...]
    second_repeated: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return a line for each of the two that has a problem twice: the problem counts twice in its scores."""
        sides = ((self.first, self.first_n, self.first_repeated), (self.second, self.second_n, self.second_repeated))
        return tuple(
            f"{len(repeated)} of {n} problems of {name} have occurred in it before, such as {repeated[0]!r}:"
            " they count twice."
            for name, n, repeated in sides
            if repeated
        )


def overlap(first: str | Path, second: str | Path, *, cache: Path) -> Overlap:
    """Return which problems two benchmarks share, loading both in a child process unless `cache` knows them.

    Two problems are the same when their prompts are, or any text of at least 24 characters that no other problem of
    their benchmark has: another template hides nothing. White space and case do not count. Raises BenchmarkError for
    what is no benchmark.
    """
    ours, theirs = _contents([resolve_benchmark(first), resolve_benchmark(second)], cache / "contents")
    known = {digest for problem in ours.problems for digest in problem.digests}
    return Overlap(
        first=ours.benchmark,
        second=theirs.benchmark,
        first_n=len(ours.problems),
        second_n=len(theirs.problems),
        shared=tuple(problem.title for problem in theirs.problems if not known.isdisjoint(problem.digests)),
        first_repeated=_repeated(ours),
        second_repeated=_repeated(theirs),
    )


def refuse_overlap(selection: str | Path, gate: str | Path, *, cache: Path, judge: str = "gate") -> Overlap:
    """Return the overlap of two benchmarks that share no problem; OverlapError naming how many when they do.

    `judge` is what the second is called.
    """
    result = overlap(selection, gate, cache=cache)
    if result.shared:
        raise OverlapError(
            f"{len(result.shared)} of the {result.second_n} problems of {judge} {result.second} are among the"
            f" {result.first_n} of selection {result.first} too, such as {result.shared[0]!r}: what chooses a candidate"
            " cannot judge it, remove them from one of the two or choose another selection benchmark."
        )
    return result


def _repeated(contents: Contents) -> tuple[str, ...]:
    seen: set[str] = set()
    repeated = []
    for problem in contents.problems:
        if not seen.isdisjoint(problem.digests):
            repeated.append(problem.title)
        seen.update(problem.digests)
    return tuple(repeated)


def _contents(benchmarks: list[Benchmark], directory: Path) -> list[Contents]:
    # lm-eval renders the prompts.
    keys = [digest_value([each.digest, version("lm_eval")]) for each in benchmarks]
    paths = [directory / f"{each.name}-{key[:24]}.json" for each, key in zip(benchmarks, keys, strict=True)]
    missing = {path: each for path, each in zip(paths, benchmarks, strict=True) if not path.exists()}
    if missing:
        directory.mkdir(parents=True, exist_ok=True)
        wanted = [
            {"benchmark": each.name, "benchmark_path": str(each.path), "path": str(path.absolute())}
            for path, each in missing.items()
        ]
        log_path = directory / "contents.log"
        line = json.dumps(wanted).encode() + b"\n"
        code = run_child("evaluation.benchmarks.contents", line, log_path=log_path, on_event=lambda _: None)
        if code != 0:
            names = ", ".join(each.name for each in missing.values())
            raise BenchmarkError(
                f"the process reading {names} failed with exit code {code}: {last_log_line(log_path)}"
                f" (more in {log_path})"
            )
    return [Contents.read(path) for path in paths]
