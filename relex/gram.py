"""One streamed pass over a trajectory: the fp64 Gram matrix of every tensor's deltas, and a digest of what it read.

G[i, j] = <theta_i - theta_0, theta_j - theta_0>. What is multiplied are increments, theta_k - theta_(k-1): they are
exact where deltas are rounded, and what is read off G as the difference of large numbers keeps its digits. G is their
sum over rows and columns. Every linear method, window and target follows from G (see `predictors`), so the weights are
read once. A Gram is saved under a digest of what it was made from, reused by whatever
needs a part of it, and extended when checkpoints are added. Of adapters the Gram is taken between factors where that is
less work (see `factor_gram`).

Shape suffixes: T = tensors that move, K = checkpoints.
"""

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from relex import factor_gram
from relex.contents import DIGEST_BYTES, put_down
from relex.errors import CheckpointDamagedError, NonFiniteError
from relex.files.directory import untouched
from relex.files.whole import write_whole
from relex.products import precision, read_rows, take
from relex.progress import Progress
from relex.ranges import Share, shared
from relex.store import Checkpoint
from relex.streaming import Job, units
from relex.trajectory import Trajectory

FORMAT = 1
# Of the files: the first had products of deltas only, and serves as it is.
_FILES = (1, 2)

Changes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Gram:
    """The Gram matrices of a trajectory.

    `products` is (T, K, K) fp64, one for each of `names`; `base_norms` is (T,) fp64, the squared norm of the base's
    tensor. `base_digest` and `digests` (one a checkpoint) identify the contents; `identities` say which files they were
    read from, `base_changes` and `changes` when each of these last changed in any way (see `Weights.changes`).
    `contents` (U, 1 + K, 16) uint8 has a digest of what each unit held, the base first (see `relex.contents`). `taken`
    (T, K, K) fp64 has the sums themselves, of increments, or of deltas where they are taken between factors: what an
    extension needs. `precision` is that of the products in a tensor of many elements, fp64 or fp32 (see
    `relex.kernel`).
    """

    steps: tuple[int, ...]
    names: tuple[str, ...]
    products: Tensor
    base_norms: Tensor
    base_digest: str
    digests: tuple[str, ...]
    identities: tuple[str, ...]
    base_changes: Changes = ()
    changes: tuple[Changes, ...] = ()
    contents: Tensor | None = None
    taken: Tensor | None = None
    precision: str = "fp64"

    @property
    def digest(self) -> str:
        """Hex digest of everything the Gram was made from."""
        content = {"format": FORMAT, "base": self.base_digest, "steps": self.steps, "checkpoints": self.digests}
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def of(self, name: str) -> Tensor:
        """Return the (K, K) Gram of one tensor."""
        return self.products[self.names.index(name)]

    def rows(self, positions: Sequence[int]) -> "Gram":
        """Return the Gram of some of the checkpoints, in the given order."""
        index = torch.tensor(list(positions))
        begins = list(positions) == list(range(len(positions)))
        return Gram(
            tuple(self.steps[i] for i in positions),
            self.names,
            self.products[:, index][:, :, index],
            self.base_norms,
            self.base_digest,
            tuple(self.digests[i] for i in positions),
            tuple(self.identities[i] for i in positions),
            self.base_changes,
            tuple(self.changes[i] for i in positions) if self.changes else (),
            self.contents[:, [0, *(1 + i for i in positions)]] if self.contents is not None else None,
            self.taken[:, : len(positions), : len(positions)] if begins and self.taken is not None else None,
            self.precision,
        )


class Beside(Protocol):
    """What else is done with a tensor, while it is still in the page cache."""

    def ready(self, tensor: int, products_KK: Tensor | None, contents_URD: Tensor) -> Iterable[Job]:
        """Return what is to be done, once all of tensor number `tensor` was read.

        `products_KK` are of its deltas, None where it does not move; `contents_URD` has its units' digests by now. What
        was read may turn out to be damaged.
        """


def measure(
    trajectory: Trajectory,
    *,
    memory: int,
    threads: int,
    known: Gram | None = None,
    share: Share | None = None,
    beside: Beside | None = None,
    on_progress: Progress | None = None,
) -> Gram:
    """Read the trajectory once, within `memory` bytes, and return its Gram.

    `known` holds products of the first checkpoints of this trajectory, taken in the same way, that need not be taken
    again; with `share` other processes take them, range by range (see `ranges`), each within `memory`, and nothing is
    done `beside`. Raises NonFiniteError and CheckpointDamagedError naming the tensor and the step,
    CheckpointChangedError when a file changed meanwhile, MemoryBudgetError.
    """
    count = len(trajectory.checkpoints)
    if known is not None and (known.taken is None or known.precision != precision(trajectory)):
        known = None
    kept = len(known.steps) if known is not None else 0
    moving = [index for index, spec in enumerate(trajectory.tensors) if spec.moves]
    position = {tensor: place for place, tensor in enumerate(moving)}
    taken = torch.zeros(len(moving), count, count, dtype=torch.float64)
    base_norms = torch.zeros(len(moving), dtype=torch.float64)
    hashes = [xxhash.xxh3_128() for _ in range(count + 1)]
    per_element = [
        spec.base.dtype.itemsize + spec.dtype.itemsize * read_rows(spec) for i, spec in enumerate(trajectory.tensors)
    ]
    total = sum(spec.count * size for spec, size in zip(trajectory.tensors, per_element, strict=True))
    done = 0
    erased: list[tuple[str, int]] = []
    pieces = units(trajectory)
    contents = torch.zeros(len(pieces), count + 1, DIGEST_BYTES, dtype=torch.uint8)
    urgent: deque[Job] = deque()
    results = (
        take(trajectory, pieces, first=kept, memory=memory, threads=threads, urgent=urgent)
        if share is None
        else shared(trajectory, pieces, share, first=kept, memory=memory, threads=threads)
    )
    # In the order of the units, wherever they were taken: the bits do not depend on it.
    with closing(results):
        for number, (unit, one) in enumerate(results):
            spec = trajectory.tensors[unit.tensor]
            put_down(contents, number, one.digests)
            for row, whole in enumerate(hashes):
                if unit.start == 0:
                    whole.update(f"{spec.name} {list(spec.base.shape)}".encode())
                whole.update(one.digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES])
            erased += [(spec.name, row) for row in one.erased]
            if spec.moves:
                taken[position[unit.tensor]] += one.products
                base_norms[position[unit.tensor]] += one.base_norm
            if beside is not None and share is None and unit.stop == spec.count:
                one_KK = None
                if spec.moves:
                    only = slice(position[unit.tensor], position[unit.tensor] + 1)
                    sums = _completed(taken[only], known.taken[only] if known and known.taken is not None else None)
                    one_KK = _of_deltas(sums, [factor_gram.pays(spec)])[0]
                urgent.extend(beside.ready(unit.tensor, one_KK, contents))
            done += (unit.stop - unit.start) * per_element[unit.tensor]
            if on_progress is not None:
                on_progress(done, total)
    trajectory.check_unchanged()

    taken = _completed(taken, known.taken if known else None)
    names = tuple(trajectory.tensors[index].name for index in moving)
    gram = Gram(
        trajectory.steps,
        names,
        _of_deltas(taken, [factor_gram.pays(trajectory.tensors[index]) for index in moving]),
        base_norms,
        hashes[0].hexdigest(),
        tuple(digest.hexdigest() for digest in hashes[1:]),
        tuple(checkpoint.weights.identity for checkpoint in trajectory.checkpoints),
        trajectory.base.changes,
        tuple(checkpoint.weights.changes for checkpoint in trajectory.checkpoints),
        contents,
        taken,
        precision(trajectory),
    )
    if known is not None and (gram.base_digest, gram.digests[:kept]) != (known.base_digest, known.digests):
        # Same files by their stat, other bytes: what was known is about something else.
        return measure(trajectory, memory=memory, threads=threads, share=share, on_progress=on_progress)
    _refuse_erased(erased, trajectory)
    _refuse_non_finite(gram, trajectory)
    return gram


def _completed(taken_TKK: Tensor, known_TKK: Tensor | None) -> Tensor:
    """Return whole matrices of lower triangles, of which the first rows may be known from before."""
    if known_TKK is not None:
        kept = known_TKK.shape[1]
        taken_TKK[:, :kept, :kept] = known_TKK
    return _mirrored(taken_TKK)


def _of_deltas(taken_TKK: Tensor, between_factors: Sequence[bool]) -> Tensor:
    """Return the products of deltas: those of increments, added up over rows and columns."""
    products_TKK = _mirrored(taken_TKK.cumsum(1).cumsum(2))
    # Of a run that came back to the base, rounding may leave less than nothing.
    squares_TK = products_TKK.diagonal(dim1=1, dim2=2)
    squares_TK.copy_(torch.where(squares_TK < 0.0, 0.0, squares_TK))
    whole = [place for place, taken in enumerate(between_factors) if taken]
    products_TKK[whole] = taken_TKK[whole]
    return products_TKK


def _mirrored(square_TKK: Tensor) -> Tensor:
    lower = square_TKK.tril()
    return lower + lower.tril(-1).mT


def _refuse_erased(erased: Sequence[tuple[str, int]], trajectory: Trajectory) -> None:
    for name, row in erased:
        checkpoint = trajectory.checkpoints[row]
        other = "another checkpoint" if trajectory.adapters else "the base"
        raise CheckpointDamagedError(
            f"{checkpoint.weights.directory}: a stretch of {name} is all zeros at step {checkpoint.step}, and {other}"
            " has weights there: that part of the file was lost. Copy the checkpoint again, choose a window before it,"
            " or delete the directory."
        )


def _refuse_non_finite(gram: Gram, trajectory: Trajectory) -> None:
    finite_TK = torch.isfinite(gram.products.diagonal(dim1=1, dim2=2))
    base_T = torch.isfinite(gram.base_norms)
    for place in (~(base_T & finite_TK.all(1))).nonzero().flatten().tolist():
        name = gram.names[place]
        if not bool(base_T[place]):
            raise NonFiniteError(
                f"base {trajectory.base.directory}: {name} holds NaN or infinity. Give an intact base."
            )
        checkpoint = trajectory.checkpoints[int((~finite_TK[place]).nonzero()[0])]
        raise NonFiniteError(
            f"{checkpoint.weights.directory}: {name} holds NaN or infinity at step {checkpoint.step}."
            " The run has diverged there, or the file is damaged: choose a window before it, or delete the"
            " directory."
        )


def cached(
    trajectory: Trajectory,
    directory: Path,
    *,
    memory: int,
    threads: int,
    share: Share | None = None,
    beside: Beside | None = None,
    on_progress: Progress | None = None,
) -> Gram:
    """Return the Gram of `trajectory`: from `directory`, else measured (from what is there) and saved."""
    wanted = trajectory.checkpoints
    base = trajectory.base.identity
    # An earlier version had experts that are stored fused as one tensor.
    names = tuple(spec.name for spec in trajectory.tensors if spec.moves)
    known: Gram | None = None
    superseded: Path | None = None
    for path in sorted(directory.glob("*.safetensors")):
        kept = _load(path, base)
        # A file may be written again with its size and time put back; then it has changed all the same.
        if kept is None or kept.names != names or not _untouched(trajectory.base.changes, kept.base_changes):
            continue
        have = zip(kept.steps, kept.identities, kept.changes, strict=True)
        # Only from the first on: the last bits of a product depend on its place in the tiles.
        shared = len(list(takewhile(lambda pair: _same(*pair), zip(have, wanted, strict=False))))
        if shared == len(wanted):
            return kept.rows(range(shared))
        # What was taken in another way is no beginning of what is taken now.
        if shared > (len(known.steps) if known is not None else 0):
            known, superseded = kept.rows(range(shared)), path if shared == len(kept.steps) else None
    gram = measure(
        trajectory, memory=memory, threads=threads, known=known, share=share, beside=beside, on_progress=on_progress
    )
    _save(gram, base, directory)
    if superseded is not None and superseded.name != f"{gram.digest}.safetensors":
        # Every row of the shorter one is in the longer one.
        superseded.unlink(missing_ok=True)
    return gram


def forget(trajectory: Trajectory, directory: Path) -> None:
    """Remove the Grams of this trajectory's base from `directory`: what they were read from holds other bytes."""
    for path in directory.glob("*.safetensors"):
        if _load(path, trajectory.base.identity) is not None:
            path.unlink(missing_ok=True)


def _same(kept: tuple[int, str, Changes], wanted: Checkpoint) -> bool:
    """Whether a row of a saved Gram was read from the files that a checkpoint has now."""
    step, identity, changes = kept
    return (step, identity) == (wanted.step, wanted.weights.identity) and _untouched(wanted.weights.changes, changes)


def _untouched(now: Changes, was: Changes) -> bool:
    return len(now) == len(was) and all(map(untouched, now, was))


def _save(gram: Gram, base_identity: str, directory: Path) -> None:
    metadata = {
        "format": _FILES[-1],
        "precision": gram.precision,
        "steps": gram.steps,
        "names": gram.names,
        "base_digest": gram.base_digest,
        "base_identity": base_identity,
        "digests": gram.digests,
        "identities": gram.identities,
        "base_changes": gram.base_changes,
        "changes": gram.changes,
    }
    tensors = {"products": gram.products.contiguous(), "base_norms": gram.base_norms}
    for name, kept in (("contents", gram.contents), ("taken", gram.taken)):
        if kept is not None:
            tensors[name] = kept.contiguous()
    content = save(tensors, metadata={"relex": json.dumps(metadata)})
    write_whole(content, directory / f"{gram.digest}.safetensors")


def _load(path: Path, base_identity: str) -> Gram | None:
    """Return the Gram saved at `path`, None when it is of another base, another format or no Gram at all."""
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            metadata: Mapping[str, Any] = json.loads((file.metadata() or {}).get("relex", "{}"))
            if metadata.get("format") not in _FILES or metadata.get("base_identity") != base_identity:
                return None
            # Of an earlier version, which did not keep what a later pass is compared with.
            if "changes" not in metadata or "contents" not in file.keys():  # noqa: SIM118
                return None
            products, base_norms = file.get_tensor("products"), file.get_tensor("base_norms")
            held = file.get_tensor("contents")
            taken = file.get_tensor("taken") if "taken" in file.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
    return Gram(
        tuple(metadata["steps"]),
        tuple(metadata["names"]),
        products,
        base_norms,
        metadata["base_digest"],
        tuple(metadata["digests"]),
        tuple(metadata["identities"]),
        _pairs(metadata["base_changes"]),
        tuple(map(_pairs, metadata["changes"])),
        held,
        taken,
        metadata.get("precision", "fp64"),
    )


def _pairs(changes: Any) -> Changes:
    return tuple((when, links) for when, links in changes)
