"""Random damage to one checkpoint of a run on disk, and what reading the run then comes to.

A fault is one of those that stores, trainers and people really cause. Whatever it hits, the run is refused in words, or
it reads as if nothing had happened (a file that nobody reads was hit). It is never read wrong.
"""

import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from relex import gram, store
from relex.errors import RelexError
from relex.gram import Gram
from relex.trajectory import open_trajectory
from tests.relex.trajectories import MIB, Run, State, drift

PAGE = 4096
CANARY = "executed"

# Small enough for hundreds of cases, with one tensor that several pages belong to.
SHAPES = {
    "model.embed_tokens.weight": (23, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.mlp.down_proj.weight": (61, 67),
    "model.layers.0.self_attn.q_proj.weight": (12, 8),
    "lm_head.weight": (23, 8),
}


def states(dtype: torch.dtype = torch.float32) -> dict[int, State]:
    """Return the states of a small run: floats only, since a trainer's shards hold parameters."""
    return {
        step: {name: tensor for name, tensor in state.items() if name in SHAPES}
        for step, state in drift(SHAPES, base=torch.float32, stored=dtype).items()
    }


@dataclass(frozen=True)
class Fault:
    """What was done to which file, for the message of a failing case."""

    kind: str
    file: str
    detail: str = ""


def measure(run: Run, *, between: Callable[[], object] = lambda: None) -> Gram:
    """Look at the store, do `between`, and read every checkpoint."""
    base = store.open_base(run.base)
    stored = store.scan(run.run, base, now=time.time())
    trajectory = open_trajectory(base, store.observed(stored, run.run))
    between()
    return gram.measure(trajectory, memory=64 * MIB, threads=1)


def truncate(file: Path, chance: random.Random) -> str:
    size = chance.randrange(file.stat().st_size) if file.stat().st_size else 0
    os.truncate(file, size)
    return f"to {size} bytes"


def delete(file: Path, chance: random.Random) -> str:
    file.unlink()
    return ""


def zero(file: Path, chance: random.Random) -> str:
    """Overwrite whole pages with zeros, as a file system gives back what it lost."""
    size = file.stat().st_size
    first = chance.randrange(-(-size // PAGE) or 1)
    count = min(chance.randint(1, 4) * PAGE, size - first * PAGE)
    with file.open("r+b") as handle:
        handle.seek(first * PAGE)
        handle.write(bytes(count))
    return f"{count} bytes from {first * PAGE}"


def punch(file: Path, chance: random.Random) -> str:
    """Make the file's end a hole: the length is right, the bytes have not arrived."""
    size = file.stat().st_size
    # A few zeros at the very end are weights for all that anybody can tell.
    kept = chance.randrange(max(size - 64, 1))
    os.truncate(file, kept)
    os.truncate(file, size)
    return f"{kept} of {size} bytes"


def claim_an_exabyte(file: Path, chance: random.Random) -> str:
    """Overwrite a length: the header's at the start of safetensors, an entry's near the end of a zip."""
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.seek(max(size - chance.randint(8, 90), 0) if file.suffix in {".pt", ".distcp"} else 0)
        where = handle.tell()
        handle.write((1 << chance.randint(40, 63)).to_bytes(8, "little"))
    return f"at byte {where}"


def link_out(file: Path, chance: random.Random) -> str:
    """Move the file out of the checkpoint and leave a link to it, or to a file of the system."""
    outside = file.parents[3] / f"outside-{file.name}"
    file.rename(outside)
    target = chance.choice([outside, Path("/etc/passwd")])
    file.symlink_to(target)
    return f"to {target.name}"


def payload(file: Path, chance: random.Random) -> str:
    """Replace the file by a pickle that leaves a canary where it is loaded."""
    command = f"touch {file.parents[3] / CANARY}".encode()
    file.write_bytes(b"cposix\nsystem\n(V" + command + b"\ntR.")
    return ""


FAULTS: tuple[Callable[[Path, random.Random], str], ...] = (
    truncate, truncate, truncate, delete, zero, zero, punch, claim_an_exabyte, link_out, payload,
)  # fmt: skip


def check_random_faults(
    write: Callable[[Path], Run],
    tmp_path: Path,
    *,
    cases: int,
    seed: int,
) -> dict[str, int]:
    """Write one good run, damage copies of it in `cases` random ways, and return how often each was refused."""
    good = write(tmp_path / "good")
    truth = measure(good)
    refused: dict[str, int] = {}
    for number in range(cases):
        chance = random.Random(f"{seed} {number}")
        root = tmp_path / f"case-{number}"
        shutil.copytree(good.base.parent, root, symlinks=True)
        run = Run(root / good.base.name, root / good.run.name)
        steps = sorted(path for path in run.run.iterdir() if path.is_dir())
        step = chance.choice(steps)
        file = chance.choice(sorted(path for path in step.rglob("*") if path.is_file()))
        hit = chance.choice(FAULTS)
        before = file.stat()
        directory = file.parent.stat()
        while_reading = chance.random() < 0.2

        def damage(
            file: Path = file, hit: Callable[[Path, random.Random], str] = hit, chance: random.Random = chance
        ) -> None:
            nonlocal fault
            fault = Fault(hit.__name__, str(file.relative_to(root)), hit(file, chance))  # noqa: B023 - called at once

        fault = Fault(hit.__name__, file.name)
        try:
            if while_reading:
                found = measure(run, between=damage)
            else:
                damage()
                # As after a crash long ago: nothing but the content tells.
                if not file.is_symlink() and file.exists():
                    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
                os.utime(file.parent, ns=(directory.st_atime_ns, directory.st_mtime_ns))
                found = measure(run)
        except RelexError as error:
            refused[fault.kind] = refused.get(fault.kind, 0) + 1
            assert "\n" not in str(error), (number, fault)  # noqa: PT017 - one that is not refused is looked at below
        else:
            same = torch.equal(found.products, truth.products) and found.digests == truth.digests
            if not same:
                pytest.fail(f"case {number}, {fault}: read wrong")
        assert not (root / CANARY).exists(), (number, fault)
        shutil.rmtree(root)
    return refused
