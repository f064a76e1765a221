"""What matrix methods add to each tensor, found once for all methods and targets of a call, and kept beside the Grams.

The vectors of one unit (see `MatrixPredictor`) lie in a file named by a digest of everything they follow from, complete
or absent: what took hours is not done again because another alpha is asked for, or the process was killed.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from zipfile import BadZipFile

from relex import rank_one
from relex.errors import TargetError
from relex.files.whole import write_whole
from relex.gram import Gram
from relex.predictors import Method
from relex.predictors.predictor import MatrixPredictor
from relex.progress import Progress
from relex.rank_one import RankOne
from relex.trajectory import Trajectory
from relex.triplets import Source

# What is kept of an earlier one knows fewer tensors, Conv1D the wrong way round, and another order to learn in.
FORMAT = 3


def added(
    trajectory: Trajectory,
    gram: Gram,
    wanted: Sequence[tuple[Method, int]],
    *,
    directory: Path,
    memory: int,
    threads: int,
    on_progress: Progress | None = None,
) -> Iterator[dict[str, RankOne] | None]:
    """Yield by tensor what each method adds at its target step, in their order; None for methods that add nothing.

    What several of them share is found when the first one is asked for. Raises TargetError when a method's parameters
    do not fit the window or the model, MemoryBudgetError, CheckpointChangedError.
    """
    asked = [
        (method, method.predictor, method.predictor.aim(target))
        if isinstance(method.predictor, MatrixPredictor)
        else None
        for method, target in wanted
    ]
    known: dict[str, dict[str, RankOne]] = {}
    for wish in asked:
        if wish is None:
            yield None
            continue
        method, predictor, aim = wish
        key = _key(gram, predictor, aim)
        if key not in known:
            aims = {other[2] for other in asked if other is not None and _unit(other[1]) == _unit(predictor)}
            source = Source(trajectory, _moving(trajectory, gram, method), memory, threads, on_progress)
            known |= _found(gram, source, predictor.unit, sorted(aims), directory)
        yield {name: vectors.scaled(predictor.scale) for name, vectors in known[key].items()}


def _found(
    gram: Gram, source: Source, unit: MatrixPredictor, aims: Sequence[float], directory: Path
) -> dict[str, dict[str, RankOne]]:
    """Return the unit's vectors at every aim, by their keys: what is kept, and what has to be found, then kept too."""
    keys = {aim: _key(gram, unit, aim) for aim in aims}
    kept = {key: _load(directory / f"{key}.npz") for key in keys.values()}
    ready = {key: vectors for key, vectors in kept.items() if vectors is not None}
    missing = [aim for aim, key in keys.items() if key not in ready]
    if missing:
        made = unit.vectors(source, missing)
        source.trajectory.check_unchanged()
        for aim, vectors in zip(missing, made, strict=True):
            write_whole(rank_one.to_bytes(vectors), directory / f"{keys[aim]}.npz")
            ready[keys[aim]] = vectors
    return ready


def _moving(trajectory: Trajectory, gram: Gram, method: Method) -> tuple[str, ...]:
    """Return the tensors that the method predicts; what never moved is not looked at."""
    meant = [
        spec.name
        for spec in trajectory.tensors
        if spec.moves and method.predictor.moves(spec.name, len(spec.base.shape))
    ]
    if not meant:
        raise TargetError(
            f"method {method.name} predicts none of this model's {len(trajectory.tensors)} tensors, such as"
            f" {trajectory.tensors[0].name}: their names or shapes are not what it looks for. Choose another method."
        )
    moved = dict(zip(gram.names, gram.products.diagonal(dim1=-2, dim2=-1).any(-1).tolist(), strict=True))
    return tuple(name for name in meant if moved[name])


def _unit(predictor: MatrixPredictor) -> str:
    unit = predictor.unit
    return json.dumps([type(unit).__name__, asdict(unit)], sort_keys=True)  # type: ignore[call-overload]


def _key(gram: Gram, predictor: MatrixPredictor, aim: float) -> str:
    return sha256(json.dumps([FORMAT, gram.digest, _unit(predictor), aim]).encode()).hexdigest()


def _load(path: Path) -> dict[str, RankOne] | None:
    """Return the vectors saved at `path`, None when there are none."""
    try:
        return rank_one.from_bytes(path.read_bytes())
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
