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
from functools import partial
from pathlib import Path

import torch

from relex import gram, store
from relex.errors import RelexError
from relex.gram import Gram
from relex.trajectory import open_trajectory
from tests.helpers.trajectories import MIB, Run, State, drift

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
    outside = _root(file) / f"outside-{file.name}"
    file.rename(outside)
    target = chance.choice([outside, Path("/etc/passwd")])
    file.symlink_to(target)
    return f"to {target.name}"


def payload(file: Path, chance: random.Random) -> str:
    """Replace the file by a pickle that leaves a canary where it is loaded."""
    command = f"touch {_root(file) / CANARY}".encode()
    file.write_bytes(b"cposix\nsystem\n(V" + command + b"\ntR.")
    return ""


def _root(file: Path) -> Path:
    return next(parent for parent in file.parents if (parent / "base").is_dir())


FAULTS: tuple[Callable[[Path, random.Random], str], ...] = (
    truncate, truncate, truncate, delete, zero, zero, punch, claim_an_exabyte, link_out, payload,
)  # fmt: skip


def check_random_faults(write: Callable[[Path], Run], tmp_path: Path, *, cases: int, seed: int) -> dict[str, int]:
    """Write one good run, damage copies of it in `cases` random ways, and return how often each was refused."""
    good = write(tmp_path / "good")
    truth = measure(good)
    refused: dict[str, int] = {}
    for number in range(cases):
        chance = random.Random(f"{seed} {number}")
        root = tmp_path / f"case-{number}"
        shutil.copytree(good.base.parent, root, symlinks=True)
        run = Run(root / good.base.name, root / good.run.name)
        file = chance.choice(sorted(path for path in run.run.rglob("*") if path.is_file()))
        hit = chance.choice(FAULTS)
        done: list[Fault] = []
        try:
            if chance.random() < 0.2:
                found = measure(run, between=partial(inflict, hit, file, chance, done))
            else:
                inflict(hit, file, chance, done, silent=True)
                found = measure(run)
        except RelexError as error:
            refused[hit.__name__] = refused.get(hit.__name__, 0) + 1
            assert "\n" not in str(error), (number, done)  # noqa: PT017 - what is not refused is looked at below
        else:
            same = torch.equal(found.products, truth.products) and found.digests == truth.digests
            assert same, f"case {number}, {done}: read wrong"
        assert not (root / CANARY).exists(), (number, done)
        shutil.rmtree(root)
    return refused


def inflict(
    hit: Callable[[Path, random.Random], str],
    file: Path,
    chance: random.Random,
    done: list[Fault],
    *,
    silent: bool = False,
) -> None:
    """Damage `file` and note it; silent is as after a crash long ago, when nothing but the content tells."""
    times = {path: path.stat() for path in (file, file.parent)}
    done.append(Fault(hit.__name__, str(file), hit(file, chance)))
    for path, stat in times.items():
        if silent and path.exists() and not path.is_symlink():
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
