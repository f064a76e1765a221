"""Formats that are recognised and not read: each is refused with the trainer's own way to export what is."""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from relex.errors import CheckpointIncompleteError
from relex.files.directory import Directory

# Trainers bury them deepest at policy/weights/iter_0000000 and at actor/model/dist_ckpt.
_DEPTH = 3


def megatron_files(names: Collection[str]) -> list[str]:
    """Return which of the files of a directory show it to be Megatron's, sorted; [] when it is not.

    Its distributed checkpoints are DCP too, with names and shapes of its own.
    """
    own = sorted({"common.pt", "metadata.json"}.intersection(names))
    sharded = any(name == ".metadata" or name.endswith(".distcp") for name in names)
    return own if len(own) == 2 or sharded else sorted({"model_optim_rng.pt"}.intersection(names))


def _matching(pattern: str) -> Callable[[Collection[str]], list[str]]:
    return lambda names: sorted(filter(re.compile(pattern).fullmatch, names))


@dataclass(frozen=True)
class _Format:
    """One format: what it is, the files by which a directory has it, and the way out.

    `place` matches the whole path of such a directory below the step directory.
    """

    what: str
    files: Callable[[Collection[str]], list[str]]
    way_out: str
    place: str = ".*"


_FORMATS = (
    _Format(
        "DeepSpeed ZeRO",
        _matching(r".*_(model|optim)_states\.pt|zero_to_fp32\.py"),
        "set stage3_gather_16bit_weights_on_model_save in the DeepSpeed config, or give OpenRLHF --ckpt.save_hf"
        " (--save_hf_ckpt in older releases); what is saved already, convert with `python zero_to_fp32.py"
        " CHECKPOINT_DIR OUT --safe_serialization`.",
    ),
    _Format(
        "verl's Megatron",
        megatron_files,
        "set actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]; what is saved already,"
        " convert with `python -m verl.model_merger merge --backend megatron --local_dir ACTOR_DIR --target_dir OUT`.",
        place=r"(.*/)?dist_ckpt",
    ),
    _Format(
        "NeMo-RL's Megatron",
        megatron_files,
        "convert it with NeMo-RL's `examples/converters/convert_megatron_to_hf.py --config CONFIG --megatron-ckpt-path"
        " ITER_DIR --hf-ckpt-path OUT`, or train with its DTensor backend.",
        place=r"policy/weights/iter_\d+",
    ),
    _Format(
        "Megatron",
        megatron_files,
        "give slime --save-hf 'OUT/hf_{rollout_id}', or convert what is saved with slime's"
        " `tools/convert_torch_dist_to_hf.py --input-dir ITER_DIR --output-dir OUT --origin-hf-dir BASE`, or with"
        " Megatron-Bridge: `AutoBridge.from_hf_pretrained(BASE).export_ckpt(ITER_DIR, OUT)`.",
    ),
    _Format(
        "GGUF",
        _matching(r".*\.gguf"),
        "it is an export for inference. Give the safetensors it was made from.",
    ),
    _Format(
        "a pickle",
        _matching(r"((pytorch_|adapter_)?model|consolidated|policy|actor|weights)[\w.-]*\.(bin|pt|pth|ckpt)"),
        "save with safetensors (Trainer and TRL do unless save_safetensors is false); what is saved already, load with"
        " from_pretrained and write with save_pretrained.",
    ),
)


def refuse_known(directory: Directory) -> None:
    """Raise CheckpointIncompleteError, with the way out, when `directory` holds weights that are never read."""
    places = dict(_tree(directory, "", _DEPTH))
    for known in _FORMATS:
        for place, names in places.items():
            foreign = known.files(names) if re.fullmatch(known.place, place) else []
            if foreign:
                raise CheckpointIncompleteError(
                    f"{directory} holds {known.what}: {'/'.join(filter(None, (place, foreign[0])))} is not read:"
                    f" {known.way_out}"
                )


def _tree(directory: Directory, place: str, depth: int) -> Iterator[tuple[str, Collection[str]]]:
    """Yield (path below the first, names of the files) of a directory and of those in it, parents first."""
    yield place, directory.files().keys()
    for name in directory.children() if depth else ():
        yield from _tree(directory.enter(name), f"{place}/{name}".lstrip("/"), depth - 1)
