"""verl's FSDP checkpoints: `actor/model_world_size_W_rank_R.pt`, each rank's part of every tensor, by its HF name.

FSDP1, FSDP2 and hybrid sharding; a plain tensor is one that every rank has whole. Of a LoRA run they are peft's model:
the base, unless it was left out, and the factors, whose scale is in `lora_train_meta.json`.
"""

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from relex.errors import CheckpointIncompleteError, CheckpointMismatchError
from relex.files.directory import Directory, FileIdentity
from relex.formats.pickled import shown
from relex.formats.torch_file import read_torch_file, require_contiguous
from relex.layouts import peft
from relex.layouts.hf import descend, read_json
from relex.layouts.sharding import Part, box_of, part_of
from relex.layouts.weights import Piece, TensorEntry, Weights, make_weights, tiled

NAME = "verl_fsdp"

_PLACES = ("", "actor")
_RANK_FILE = re.compile(r"model_world_size_([1-9][0-9]*)_rank_(0|[1-9][0-9]*)\.pt")
# What verl writes beside them, with the number of ranks.
_SETTINGS = "fsdp_config.json"
_ADAPTER = "lora_adapter"
_TRAINED = "lora_train_meta.json"
# Files of one checkpoint read at once, which matters where each read is a request.
_READERS = 16


def find(step: Directory) -> Directory | None:
    """Return the directory of the rank files; None when there is none, or when it is a LoRA run with its adapter."""
    for place in _PLACES:
        directory = descend(step, place)
        if directory is not None and any(map(_RANK_FILE.fullmatch, directory.files())):
            return None if _ADAPTER in directory.children() else directory
    return None


def open_weights(directory: Directory, *, base: Weights) -> Weights:
    """Open the parts of all ranks; raises CheckpointIncompleteError when a rank's is missing or not whole."""
    files = _rank_files(directory)
    tensors = _tensors(directory, files)
    if any(map(peft.is_factor, tensors)):
        return _adapter(directory, tensors, files, base=base)
    settings = descend(directory, "huggingface")
    own = settings is not None and "config.json" in settings.files()
    config = read_json(settings, "config.json") if settings is not None and own else base.config
    return make_weights(NAME, directory, tensors, files, config)


def _adapter(
    directory: Directory, tensors: Mapping[str, TensorEntry], files: tuple[FileIdentity, ...], *, base: Weights
) -> Weights:
    """Return the adapter of a LoRA run; the base beside it is left alone, since it is frozen."""
    present = directory.files()
    if _TRAINED not in present:
        raise CheckpointIncompleteError(
            f"{directory} is of a LoRA run, and has no {_TRAINED}, which says its scale. If the trainer is still"
            ' writing, wait; otherwise write it there: {"r": RANK, "lora_alpha": ALPHA}.'
        )
    trained = read_json(directory, _TRAINED)
    factors = {name: entry for name, entry in tensors.items() if peft.is_factor(name)}
    for name, entry in tensors.items():
        own = peft.canonical(name).replace(".base_layer.", ".")
        if name not in factors:
            _check_frozen(directory, own, entry, base)
    # The end of MODULE.lora_A.default.weight, or of MODULE.lora_embedding_A.default.
    modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in factors}
    content = {
        "peft_type": "LORA",
        "r": trained.get("r"),
        "lora_alpha": trained.get("lora_alpha"),
        "task_type": trained.get("task_type"),
        "target_modules": sorted(modules),
        "use_dora": any("lora_magnitude_vector" in name for name in factors),
    }
    return peft.put_together(
        directory,
        content,
        factors,
        (*files, present[_TRAINED]),
        base=base,
        config_file=_TRAINED,
        weights_file=files[0].name,
    )


def _check_frozen(directory: Directory, name: str, entry: TensorEntry, base: Weights) -> None:
    like = base.tensors.get(name, base.alias if base.alias is not None and base.alias.name == name else None)
    if like is None and name == peft.HEAD:
        # Tied to the embedding, in a base that stores it once.
        return
    if like is None or like.shape != entry.shape:
        has = "does not have" if like is None else f"has with shape {list(like.shape)}"
        raise CheckpointMismatchError(
            f"{directory}: the LoRA run holds {shown(name)} with shape {list(entry.shape)}, which the base"
            f" {base.directory} {has}. Give the base this run was started from; of LoRA runs nothing but the factors is"
            " read, so train without modules_to_save."
        )


def _rank_files(directory: Directory) -> tuple[FileIdentity, ...]:
    """Return the file of every rank, in order; those of another number of ranks, left over, are not looked at."""
    present = directory.files()
    by_world: dict[int, dict[int, FileIdentity]] = {}
    for name, file in present.items():
        match = _RANK_FILE.fullmatch(name)
        if match is not None and int(match[2]) < int(match[1]):
            by_world.setdefault(int(match[1]), {})[int(match[2])] = file
    world = _world(directory, by_world, present)
    ranks = by_world.get(world, {})
    if len(ranks) < world:
        missing = next(rank for rank in range(world) if rank not in ranks)
        raise CheckpointIncompleteError(
            f"{directory} is not complete: of {world} ranks {len(ranks)} are present (missing"
            f" model_world_size_{world}_rank_{missing}.pt). If the trainer is still writing, wait; if every node writes"
            " to a disk of its own, copy the files of all nodes together."
        )
    return tuple(file for _, file in sorted(ranks.items()))


def _world(
    directory: Directory, by_world: Mapping[int, Mapping[int, FileIdentity]], present: Mapping[str, FileIdentity]
) -> int:
    """Return the number of ranks that wrote the checkpoint."""
    if _SETTINGS in present:
        world = read_json(directory, _SETTINGS).get("world_size")
        if type(world) is not int or world < 1:
            raise CheckpointIncompleteError(
                f"{directory}/{_SETTINGS} says world_size {world!r}, which is no number of ranks. If the trainer is"
                " still writing, wait; otherwise save the checkpoint again."
            )
        return world
    # By age of their newest file: what a set is left over from lies wholly before what replaced it.
    worlds = sorted(by_world, key=lambda world: max(file.mtime_ns for file in by_world[world].values()))
    complete = [world for world in worlds if len(by_world[world]) == world]
    if not complete:
        return worlds[-1]
    newest = min(file.mtime_ns for file in by_world[complete[-1]].values())
    for world in complete[:-1]:
        if max(file.mtime_ns for file in by_world[world].values()) >= newest:
            raise CheckpointMismatchError(
                f"{directory} has the files of {world} ranks and of {complete[-1]} ranks, and no {_SETTINGS} says which"
                " are meant. Delete those left over from the earlier run."
            )
    return complete[-1]


@lru_cache(maxsize=1024)  # a watcher looks at the same finished checkpoints every few seconds
def _tensors(directory: Directory, files: tuple[FileIdentity, ...]) -> Mapping[str, TensorEntry]:
    with ThreadPoolExecutor(_READERS) as pool:
        states = list(pool.map(lambda file: _state(directory, file), files))
    for file, state in zip(files, states, strict=True):
        different = sorted(state.keys() ^ states[0].keys())
        if different:
            raise CheckpointMismatchError(
                f"{directory}: only one of {files[0].name} and {file.name} has {shown(different[0])}. They are not of"
                " one checkpoint: save it again."
            )
    return {
        name: _entry(directory, name, {file.name: state[name] for file, state in zip(files, states, strict=True)})
        for name in states[0]
    }


def _entry(directory: Directory, name: str, parts: Mapping[str, Part | None]) -> TensorEntry:
    """Put together the parts of one tensor by rank file; a rank may have none, and replicas are read once."""
    held = {file: part for file, part in parts.items() if part is not None}
    kinds = {(part.shape, part.local.dtype, len(part.axes)) for part in held.values()}
    if len(kinds) != 1:
        raise CheckpointMismatchError(
            f"{directory}: the ranks have tensor {shown(name)} in {len(kinds)} shapes, dtypes or meshes. They are not"
            " of one checkpoint: save it again."
        )
    ((shape, dtype, dimensions),) = kinds
    # Every place of a mesh has a rank, so the last coordinate along an axis says how long the axis is.
    sizes = [1 + max(part.axes[axis][1] for part in held.values()) for axis in range(dimensions)]
    pieces: dict[tuple[tuple[int, ...], tuple[int, ...]], Piece] = {}
    for file, part in held.items():
        origin, box = box_of(part, sizes) if sizes else (part.origin, part.local.shape)
        if box != part.local.shape:
            raise CheckpointMismatchError(
                f"{directory}/{file}: the part of tensor {shown(name)} has shape {list(part.local.shape)}; by its place"
                f" in the mesh {sizes} it should have {list(box)}. A rank's file is of another checkpoint: save it"
                " again."
            )
        require_contiguous(part.local, name, where=f"{directory}/{file}")
        pieces.setdefault((origin, box), Piece(file, part.local.offset, origin, box))
    return tiled(name, dtype, shape, list(pieces.values()), where=directory)


def _state(directory: Directory, file: FileIdentity) -> dict[str, Part | None]:
    """Return this rank's part of every tensor by name, None where it has none."""
    where = f"{directory}/{file.name}"
    state = read_torch_file(directory, file)
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise CheckpointMismatchError(
            f"{where} holds no tensors by name, as verl writes them. Save the checkpoint again."
        )
    parts: dict[str, Part | None] = {}
    for name, value in state.items():
        try:
            parts[name] = part_of(value)
        # Whatever is not where torch puts it.
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointMismatchError(
                f"{where}: tensor {shown(name)} is not stored in a way that can be read ({shown(str(error))}). Merge"
                " the checkpoint with python -m verl.model_merger merge --backend fsdp."
            ) from error
    return parts
