"""Random damage to one checkpoint of a run on disk, and what reading the run then comes to.

A fault is one of those that stores, trainers and people really cause. Whatever it hits, the run is refused in words, or
it reads as if nothing had happened (a file that nobody reads was hit). It is never read wrong.
"""

import json
import os
import pickletools
import random
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from relex import gram, store
from relex.errors import RelexError
from relex.files.local import LocalDirectory
from relex.gram import Gram
from relex.layouts.planned import planned
from relex.layouts.pruning import warning
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


def circle(file: Path, chance: random.Random) -> str:
    """Put a link in the place of the file that leads to itself, by one step or by two, or to its directory."""
    file.unlink()
    target = chance.choice([file.name, f"{file.name}.link", "."])
    file.symlink_to(target)
    if target.endswith(".link"):
        file.with_name(target).symlink_to(file.name)
    return f"by {target}"


def special(file: Path, chance: random.Random) -> str:
    """Put something that is no regular file in its place: a pipe nobody writes to, a socket, an empty directory."""
    file.unlink()
    kind = chance.choice(["pipe", "socket", "directory"])
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        os.mknod(file, stat.S_IFSOCK | 0o600)
    return kind


def _root(file: Path) -> Path:
    return next(parent for parent in file.parents if (parent / "base").is_dir())


FAULTS: tuple[Callable[[Path, random.Random], str], ...] = (
    truncate, truncate, truncate, delete, zero, zero, punch, claim_an_exabyte, link_out, payload, circle, special,
)  # fmt: skip


# What an adapter's settings say of its weights: another value is another adapter, not a fault.
MEANING = {"lora_alpha", "r", "use_rslora", "alpha_pattern", "rank_pattern", "fan_in_fan_out"}

# In the place of any value: other types, other signs, too much of it.
ODD_VALUES: tuple[Any, ...] = (
    None, True, [], {}, [[]], [None], {"": None}, "", "nosuch", "../../etc/passwd", "/dev/zero", "\x1b[2J", "٣",
    0, -1, 1, 7, 1 << 40, 1 << 63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    ["a"] * 1000, {"a": {"b": {"c": []}}},
)  # fmt: skip


def mutate_json(file: Path, chance: random.Random) -> str:
    """Put another value, or no value, in one place of a JSON file, or break the file as a whole."""
    content = json.loads(file.read_bytes())
    if chance.random() < 0.2:
        broken: tuple[bytes, ...] = (
            b"", b"\xff\xfe", b"null", b"[]", b"7", b'"text"', b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000,
            b"{" + b" " * 1000, file.read_bytes()[:-1], file.read_bytes() * 2,
        )  # fmt: skip
        number = chance.randrange(len(broken))
        file.write_bytes(broken[number])
        return f"broken {number}"
    key, value = mutated(content, chance)
    file.write_text(json.dumps(content))
    return f"{key} is {value!r:.80}"


def mutate_header(file: Path, chance: random.Random) -> str:
    """Do to the header of a safetensors file what `mutate_json` does to a JSON file; its length is right."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    key, value = mutated(header, chance)
    odd: tuple[Any, ...] = ([], None, [header], "x")
    text = json.dumps(chance.choice(odd) if chance.random() < 0.1 else header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    return f"{key} is {value!r:.80}"


def mutate_metadata(file: Path, chance: random.Random) -> str:
    """Put another number or name in one place of DCP's pickle, or another byte anywhere."""
    raw = bytearray(file.read_bytes())
    codes = [(opcode.name, place or 0) for opcode, _, place in pickletools.genops(bytes(raw))]
    values = [
        (place + 1, after)
        for (name, place), (_, after) in pairwise(codes)
        if name in {"BININT", "BININT1", "BININT2", "SHORT_BINUNICODE", "BINUNICODE", "LONG1"}
    ]
    start, stop = chance.choice(values) if chance.random() < 0.8 else (0, len(raw))
    place = chance.randrange(start, stop)
    raw[place] ^= 1 << chance.randrange(8)
    file.write_bytes(raw)
    return f"byte {place}"


def mutated(content: Any, chance: random.Random) -> tuple[str, Any]:
    """Change one place of what a JSON file holds, and return which key it belongs to and its new value."""
    places = [place for place in _places(content, "") if place[1] is not None]
    if not places:
        return "", None
    top, holder, key = chance.choice(places)
    kind = chance.random()
    value = chance.choice(ODD_VALUES)
    if kind < 0.15:
        del holder[key]
        return top, "gone"
    if kind < 0.25 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
        return top, "renamed"
    if kind < 0.35:
        # The value of another place of the same file.
        _, other, place = chance.choice(places)
        value = json.loads(json.dumps(other[place]))
    holder[key] = value
    return top, value


def _places(content: Any, top: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name of the top key, container, key) of every value."""
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(entries):
        yield top or str(key), content, key
        yield from _places(value, top or str(key))


def _is_json(path: Path) -> bool:
    return path.suffix == ".json" and path.stat().st_size > 2


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _is_metadata(path: Path) -> bool:
    return path.name == ".metadata"


def check_mutated_json(write: Callable[[Path], Run], tmp_path: Path, *, cases: int, seed: int) -> dict[str, int]:
    """Do as `check_random_faults` to every small file and header that a layout has: its JSON, its `.metadata`."""

    def damage(files: Sequence[Path], chance: random.Random) -> tuple[Callable[[Path, random.Random], str], Path]:
        kinds = ((mutate_json, _is_json), (mutate_header, _is_safetensors), (mutate_metadata, _is_metadata))
        hit, fitting = chance.choice([(hit, fit) for hit, fits in kinds if (fit := [*filter(fits, files)])])
        return hit, chance.choice(fitting)

    return _check(write, tmp_path, cases=cases, seed=seed, damage=damage)


def check_random_faults(write: Callable[[Path], Run], tmp_path: Path, *, cases: int, seed: int) -> dict[str, int]:
    """Write one good run, damage copies of it in `cases` random ways, and return how often each was refused."""

    def damage(files: Sequence[Path], chance: random.Random) -> tuple[Callable[[Path, random.Random], str], Path]:
        file = chance.choice(files)
        return chance.choice(FAULTS), file

    return _check(write, tmp_path, cases=cases, seed=seed, damage=damage)


def _check(
    write: Callable[[Path], Run],
    tmp_path: Path,
    *,
    cases: int,
    seed: int,
    damage: Callable[[Sequence[Path], random.Random], tuple[Callable[[Path, random.Random], str], Path]],
) -> dict[str, int]:
    good = write(tmp_path / "good")
    truth = measure(good)
    refused: dict[str, int] = {}
    for number in range(cases):
        chance = random.Random(f"{seed} {number}")
        root = tmp_path / f"case-{number}"
        shutil.copytree(good.base.parent, root, symlinks=True)
        run = Run(root / good.base.name, root / good.run.name)
        hit, file = damage(sorted(path for path in run.run.rglob("*") if path.is_file()), chance)
        began = time.monotonic()
        done: list[Fault] = []
        try:
            if chance.random() < 0.2:
                measured = measure(run, between=partial(inflict, hit, file, chance, done))
            else:
                inflict(hit, file, chance, done, silent=True)
                measured = measure(run)
        except RelexError as error:
            refused[hit.__name__] = refused.get(hit.__name__, 0) + 1
            assert "\n" not in str(error), (number, done)  # noqa: PT017 - what is not refused is looked at below
        except Exception as error:
            raise AssertionError(f"case {number}, {done}: a traceback") from error
        else:
            same = measured.products.shape == truth.products.shape and torch.equal(measured.products, truth.products)
            meant = (
                file.name in {"adapter_config.json", "lora_train_meta.json"} and done[0].detail.split(" ")[0] in MEANING
            )
            assert meant or (same and measured.digests == truth.digests), f"case {number}, {done}: read wrong"
        # What the trainer's files say of the run is a hint, and never a reason to fail.
        planned(LocalDirectory(run.run))
        warning(LocalDirectory(run.run), window=75)
        # A hang: a good case takes some hundredths of a second.
        assert time.monotonic() - began < 60, (number, done)
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
    for path, was in times.items():
        if silent and not path.is_symlink() and path.exists():
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
