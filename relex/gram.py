"""One streamed pass over a trajectory: the fp64 Gram matrix of every tensor's deltas, and a digest of what it read.

G[i, j] = <theta_i - theta_0, theta_j - theta_0>. Every linear method, window and target follows from G (see
`predictors`), so the weights are read once. A Gram is saved under a digest of what it was made from, reused by whatever
needs a part of it, and extended when checkpoints are added. Of adapters the Gram is taken between factors where that is
less work (see `factor_gram`).

Shape suffixes: T = tensors that move, K = checkpoints.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from relex import factor_gram
from relex.contents import stack
from relex.errors import CheckpointDamagedError, NonFiniteError
from relex.files.directory import untouched
from relex.files.whole import write_whole
from relex.progress import Progress
from relex.store import Checkpoint
from relex.streaming import Unit, Workspace, as_bytes, in_order, units, workspaces
from relex.trajectory import TensorSpec, Trajectory

# Products are taken in tiles of fixed shape: the bits of G[i, j] then do not depend on how many checkpoints there are,
# and an extended Gram equals one made afresh. 4 rows by 24 columns is what small-matrix kernels of OpenBLAS like best.
ROWS, COLUMNS = 4, 24
# Columns of one product: with these shapes it needs no packing, which is 2.4 times faster than twice as many.
WIDTH = 1 << 13
# What a file system gives back for a part that it lost: whole sectors of zeros.
_SECTOR_BYTES = 512
# Where a tensor begins or ends less than a sector of it may be lost; fewer zeros than this may be chance.
_FEWEST_ZEROS = 4
FORMAT = 1

Changes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Gram:
    """The Gram matrices of a trajectory.

    `products` is (T, K, K) fp64, one for each of `names`; `base_norms` is (T,) fp64, the squared norm of the base's
    tensor. `base_digest` and `digests` (one a checkpoint) identify the contents; `identities` say which files they were
    read from, `base_changes` and `changes` when each of these last changed in any way (see `Weights.changes`).
    `contents` (U, 1 + K, 16) uint8 has a digest of what each unit held, the base first (see `relex.contents`).
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
        )


def measure(
    trajectory: Trajectory,
    *,
    memory: int,
    threads: int,
    known: Gram | None = None,
    on_progress: Progress | None = None,
) -> Gram:
    """Read the trajectory once, within `memory` bytes, and return its Gram.

    `known` holds products of the first checkpoints of this trajectory that need not be taken again. Raises
    NonFiniteError and CheckpointDamagedError naming the tensor and the step, CheckpointChangedError when a file changed
    meanwhile, MemoryBudgetError.
    """
    count = len(trajectory.checkpoints)
    padded = -(-count // ROWS) * ROWS
    kept = len(known.steps) if known is not None else 0
    moving = [index for index, spec in enumerate(trajectory.tensors) if spec.moves]
    position = {tensor: place for place, tensor in enumerate(moving)}
    products = torch.zeros(len(moving), padded, padded, dtype=torch.float64)
    base_norms = torch.zeros(len(moving), dtype=torch.float64)
    hashes = [xxhash.xxh3_128() for _ in range(count + 1)]
    rows = [_read_rows(spec) for spec in trajectory.tensors]
    extra = padded * WIDTH * 8 + max(factor_gram.memory(spec) for spec in trajectory.tensors)
    spaces = workspaces(trajectory, count, memory=memory, threads=threads, extra=extra)

    erased: list[tuple[str, int]] = []

    def work(space: Workspace, unit: Unit) -> tuple[Tensor, float, list[bytes], list[int]]:
        part = torch.zeros(padded, padded, dtype=torch.float64)
        base_norm = 0.0
        digests = [xxhash.xxh3_128() for _ in range(count + 1)]
        wide = torch.zeros(padded, WIDTH, dtype=torch.float64)
        zeroed: list[int] = []
        spec = trajectory.tensors[unit.tensor]
        if spec.relative and unit.start == 0:
            zeroed += factor_gram.read_parts(trajectory, spec, digests[1:], erased=_erased)
            if not rows[unit.tensor]:
                part[:count, :count] = factor_gram.products(trajectory, spec, first=kept)
        for block in space.blocks(trajectory, unit, range(rows[unit.tensor])):
            digests[0].update(as_bytes(block.base))
            for digest, row in zip(digests[1:], [] if spec.relative else block.stored, strict=False):
                digest.update(as_bytes(row))
            if not spec.moves:
                continue
            for place, deltas in space.subtract(block):
                if not spec.relative:
                    zeroed += _erased(block.stored[:, place], block.base[place])
                for piece in torch.split(deltas, WIDTH, dim=1) if rows[unit.tensor] else ():
                    wide[:count, : piece.shape[1]].copy_(piece)
                    _add_products(part.numpy(), wide[:, : piece.shape[1]].numpy(), first=kept)
                base = block.base[place].double()
                base_norm += float(base @ base)
        return part, base_norm, [digest.digest() for digest in digests], zeroed

    per_element = [
        spec.base.dtype.itemsize + spec.dtype.itemsize * rows[i] for i, spec in enumerate(trajectory.tensors)
    ]
    total = sum(spec.count * size for spec, size in zip(trajectory.tensors, per_element, strict=True))
    done = 0
    held = bytearray()
    for unit, (part, base_norm, digests, zeroed) in in_order(work, units(trajectory), spaces):
        spec = trajectory.tensors[unit.tensor]
        held += b"".join(digests)
        for whole, digest in zip(hashes, digests, strict=True):
            if unit.start == 0:
                whole.update(f"{spec.name} {list(spec.base.shape)}".encode())
            whole.update(digest)
        erased += [(spec.name, row) for row in zeroed]
        if spec.moves:
            products[position[unit.tensor]] += part
            base_norms[position[unit.tensor]] += base_norm
        done += (unit.stop - unit.start) * per_element[unit.tensor]
        if on_progress is not None:
            on_progress(done, total)
    trajectory.check_unchanged()

    products = products[:, :count, :count]
    if known is not None:
        products[:, :kept, :kept] = known.products
    lower = products.tril()
    products = lower + lower.tril(-1).mT
    names = tuple(trajectory.tensors[index].name for index in moving)
    gram = Gram(
        trajectory.steps,
        names,
        products,
        base_norms,
        hashes[0].hexdigest(),
        tuple(digest.hexdigest() for digest in hashes[1:]),
        tuple(checkpoint.weights.identity for checkpoint in trajectory.checkpoints),
        trajectory.base.changes,
        tuple(checkpoint.weights.changes for checkpoint in trajectory.checkpoints),
        stack(held, checkpoints=count),
    )
    if known is not None and (gram.base_digest, gram.digests[:kept]) != (known.base_digest, known.digests):
        # Same files by their stat, other bytes: what was known is about something else.
        return measure(trajectory, memory=memory, threads=threads, on_progress=on_progress)
    _refuse_erased(erased, trajectory)
    _refuse_non_finite(gram, trajectory)
    return gram


def _read_rows(spec: TensorSpec) -> int:
    """Return of how many checkpoints the elements of a tensor are read, beside the base's."""
    return 0 if spec.unchanged or factor_gram.pays(spec) else len(spec.entries)


def _add_products(total: NDArray[np.float64], deltas: NDArray[np.float64], *, first: int) -> None:
    """Add the lower triangle of deltas @ deltas.T to `total`, from the tile of row `first` on."""
    # What is not finite is named once the pass is over.
    with np.errstate(invalid="ignore"):
        for top in range(first // ROWS * ROWS, len(deltas), ROWS):
            rows = slice(top, top + ROWS)
            for left in range(0, top + ROWS, COLUMNS):
                columns = slice(left, min(left + COLUMNS, top + ROWS))
                total[rows, columns] += deltas[rows] @ deltas[columns].T


def _erased(stored_RN: Tensor, base_N: Tensor) -> list[int]:
    """Return the rows of a chunk in which a whole sector, or its begin or end, is zero and the base's is not."""
    if stored_RN.shape[1] < _FEWEST_ZEROS:
        return []
    sector = min(_SECTOR_BYTES // stored_RN.itemsize, stored_RN.shape[1])
    # One element a sector is looked at first: weights are hardly ever exactly zero.
    suspects = (stored_RN[:, ::sector] == 0).any(dim=1) | (stored_RN[:, -_FEWEST_ZEROS:] == 0).all(dim=1)
    return [row for row in suspects.nonzero().flatten().tolist() if _lost(stored_RN[row], base_N, sector=sector)]


def _lost(stored_N: Tensor, base_N: Tensor, *, sector: int) -> bool:
    kept = ((stored_N != 0) | (base_N == 0)).nonzero().flatten()
    gaps = torch.cat([torch.tensor([-1]), kept, torch.tensor([len(stored_N)])]).diff() - 1
    return int(gaps.max()) >= sector or int(gaps[0]) >= _FEWEST_ZEROS or int(gaps[-1]) >= _FEWEST_ZEROS


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
    for place, name in enumerate(gram.names):
        if not bool(torch.isfinite(gram.base_norms[place])):
            raise NonFiniteError(
                f"base {trajectory.base.directory}: {name} holds NaN or infinity. Give an intact base."
            )
        for row, checkpoint in enumerate(trajectory.checkpoints):
            if not bool(torch.isfinite(gram.products[place, row, row])):
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
    on_progress: Progress | None = None,
) -> Gram:
    """Return the Gram of `trajectory`: from `directory`, else measured (from what is there) and saved."""
    wanted = trajectory.checkpoints
    base = trajectory.base.identity
    known: Gram | None = None
    superseded: Path | None = None
    for path in sorted(directory.glob("*.safetensors")):
        kept = _load(path, base)
        # A file may be written again with its size and time put back; then it has changed all the same.
        if kept is None or not _untouched(trajectory.base.changes, kept.base_changes):
            continue
        have = zip(kept.steps, kept.identities, kept.changes, strict=True)
        # Only from the first on: the last bits of a product depend on its place in the tiles.
        shared = len(list(takewhile(lambda pair: _same(*pair), zip(have, wanted, strict=False))))
        if shared == len(wanted):
            return kept.rows(range(shared))
        if shared > (len(known.steps) if known is not None else 0):
            known, superseded = kept.rows(range(shared)), path if shared == len(kept.steps) else None
    gram = measure(trajectory, memory=memory, threads=threads, known=known, on_progress=on_progress)
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
        "format": FORMAT,
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
    if gram.contents is not None:
        tensors["contents"] = gram.contents.contiguous()
    content = save(tensors, metadata={"relex": json.dumps(metadata)})
    write_whole(content, directory / f"{gram.digest}.safetensors")


def _load(path: Path, base_identity: str) -> Gram | None:
    """Return the Gram saved at `path`, None when it is of another base, another format or no Gram at all."""
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            metadata: Mapping[str, Any] = json.loads((file.metadata() or {}).get("relex", "{}"))
            if metadata.get("format") != FORMAT or metadata.get("base_identity") != base_identity:
                return None
            # Of an earlier version, which did not keep what a later pass is compared with.
            if "changes" not in metadata or "contents" not in file.keys():  # noqa: SIM118
                return None
            products, base_norms = file.get_tensor("products"), file.get_tensor("base_norms")
            held = file.get_tensor("contents")
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
    )


def _pairs(changes: Any) -> Changes:
    return tuple((when, links) for when, links in changes)
