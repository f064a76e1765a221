"""A prediction as a PEFT adapter directory, complete or absent, instead of a whole model.

Every adapted module gets the factors of smallest rank that hold its predicted delta (see `truncation`); what the run's
adapters hold in full, as modules_to_save, is predicted in full.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relex.contents import SecondReading
from relex.errors import NonFiniteError, RelexError, TargetError
from relex.factor_gram import left_side, right_side
from relex.forecast import Forecast
from relex.layouts.factors import AdapterWeights, Factor, LowRank
from relex.layouts.peft import CONFIG_FILE, HEAD, PREFIX, WEIGHTS_FILE
from relex.layouts.weights import embedding_name
from relex.output import manifest, truncation
from relex.output.combine import chunks, needed_rows, predicted
from relex.output.manifest import AdapterRecord, FileRecord
from relex.output.truncation import Truncated
from relex.output.writer import ModelWriter, OutputTensor, open_writer, side_files
from relex.progress import Progress
from relex.streaming import CHUNK, Unit, Workspace, as_bytes, in_order, units, workspaces
from relex.trajectory import TensorSpec, Trajectory

# With one of these a directory looks like a model's.
_MODEL_FILES = ("config.json", "generation_config.json")


def check_adapters(trajectory: Trajectory) -> None:
    """Refuse a trajectory whose prediction is no adapter: whole models, or DoRA, whose deltas are of any rank."""
    if not trajectory.adapters:
        raise TargetError(
            f"--adapter: the checkpoints are whole models ({trajectory.checkpoints[0].weights.directory}), which have"
            " no factors to predict. Leave out --adapter."
        )
    for spec in trajectory.tensors:
        if any(entry.magnitude is not None for entry in spec.adapted):
            raise TargetError(
                f"--adapter: {spec.name} is adapted by DoRA, whose predicted delta is not of low rank. Leave out"
                " --adapter to get a whole model."
            )


def adapter_digest(forecast: Forecast) -> str:
    """Return the hex digest that names a prediction written as an adapter."""
    content = {"forecast": forecast.digest, "file": WEIGHTS_FILE, "tolerance": truncation.TOLERANCE}
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_adapter(
    trajectory: Trajectory,
    forecast: Forecast,
    directory: Path,
    *,
    contents: Tensor | None = None,
    memory: int,
    threads: int,
    command: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> None:
    """Write the adapter `directory` unless it is there, within `memory` bytes.

    What is read is compared with `contents` (see `SecondReading`).

    Raises TargetError for a trajectory that `check_adapters` refuses, OutputError when the directory holds something
    else, NonFiniteError, CheckpointChangedError when an input changed meanwhile (then nothing is left behind).
    """
    check_adapters(trajectory)
    extra = max(truncation.memory(spec) for spec in trajectory.tensors) + 2 * CHUNK * 8
    spaces = workspaces(trajectory, len(trajectory.checkpoints), memory=memory, threads=threads, extra=extra)
    first = [unit for unit in units(trajectory) if trajectory.tensors[unit.tensor].relative and unit.start == 0]
    second = [unit for unit in units(trajectory) if unit in first or _whole(trajectory.tensors[unit.tensor])]
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, len(first) + len(second))

    reading = SecondReading(trajectory, contents)

    def find(_: Workspace, unit: Unit) -> Truncated:
        reading.check_factors(unit, range(len(trajectory.checkpoints)))
        return truncation.truncate(trajectory, trajectory.tensors[unit.tensor], forecast)

    cuts: dict[str, Truncated] = {}
    for unit, truncated in in_order(find, first, spaces):
        cuts[trajectory.tensors[unit.tensor].name] = truncated
        tell()
    writer = open_writer(directory, adapter_digest(forecast), _outputs(trajectory, cuts))
    if writer is None:
        return

    def write(space: Workspace, unit: Unit) -> None:
        spec = trajectory.tensors[unit.tensor]
        if spec.relative:
            _write_factors(writer, trajectory, spec, truncated=cuts[spec.name])
        else:
            _write_whole(writer, reading, forecast, space=space, unit=unit)

    try:
        name = next(iter(writer.tensors))
        if writer.pending(name):
            writer.begin(name)
            for _ in in_order(write, second, spaces):
                tell()
            writer.close(WEIGHTS_FILE)
        trajectory.check_unchanged()
        ranks = {name.removesuffix(".weight"): truncated.rank for name, truncated in cuts.items()}
        errors = {name.removesuffix(".weight"): truncated.error for name, truncated in cuts.items()}

        def provenance(files: Mapping[str, FileRecord]) -> Any:
            made = manifest.make(forecast, trajectory, files, command=command)
            return replace(made, digest=adapter_digest(forecast), adapter=AdapterRecord(ranks, errors)).to_json()

        latest = trajectory.adapters[-1]
        beside = side_files(trajectory.base, latest)
        beside = {name: content for name, content in beside.items() if name not in _MODEL_FILES}
        beside[CONFIG_FILE] = (json.dumps(_settings(latest, ranks), indent=2, sort_keys=True) + "\n").encode()
        writer.publish(beside, provenance)
    except RelexError:
        if writer.partial.exists():
            writer.discard()
        raise
    finally:
        writer.release()


def _whole(spec: TensorSpec) -> bool:
    return not spec.relative and not spec.unchanged


def _settings(latest: AdapterWeights, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the adapter_config.json: the run's own, with the ranks that were kept, and scale 1."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    own = {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others}
    own |= {"use_rslora": False, "init_lora_weights": True, "inference_mode": True}
    # What only the memory of the trainer holds, and verl writes all the same.
    return {key: value for key, value in latest.settings.items() if key != "runtime_config"} | own


def _outputs(trajectory: Trajectory, cuts: Mapping[str, Truncated]) -> list[OutputTensor]:
    outputs = []
    for spec in trajectory.tensors:
        if spec.relative:
            rank, entry = cuts[spec.name].rank, spec.adapted[-1]
            for factor in (entry.left, entry.right):
                for key, transposed in _factor_keys(trajectory, entry, factor):
                    shape = (rank, factor.length) if transposed else (factor.length, rank)
                    outputs.append(OutputTensor(key, torch.float32, shape, rank * factor.length * 4, WEIGHTS_FILE))
        elif _whole(spec):
            size = spec.count * spec.dtype.itemsize
            outputs += [
                OutputTensor(key, spec.dtype, spec.base.shape, size, WEIGHTS_FILE)
                for key in _whole_keys(trajectory, spec)
            ]
    return outputs


def _factor_keys(trajectory: Trajectory, entry: LowRank, factor: Factor) -> list[tuple[str, bool]]:
    """Return under which names one factor is stored, and whether transposed."""
    side, other = ("A", "B") if factor.transposed else ("B", "A")
    part = f"lora_embedding_{side}" if entry.embedding else f"lora_{side}.weight"
    keys = [(f"{PREFIX}{entry.name.removesuffix('.weight')}.{part}", factor.transposed)]
    latest = trajectory.adapters[-1]
    # An embedding and a head that are adapted together share their factors, crosswise.
    if entry.embedding and latest.settings.get("ensure_weight_tying") and HEAD not in latest.tensors:
        keys.append((f"{PREFIX}{HEAD.removesuffix('weight')}lora_{other}.weight", not factor.transposed))
    return keys


def _whole_keys(trajectory: Trajectory, spec: TensorSpec) -> list[str]:
    latest = trajectory.adapters[-1]
    keys = [latest.keys[spec.name]]
    # peft wants a tied head too, if it is saved with its embedding.
    if latest.alias is not None and spec.name == embedding_name(latest.tensors):
        keys.append(latest.keys[HEAD])
    return [PREFIX + key for key in keys]


def _write_factors(writer: ModelWriter, trajectory: Trajectory, spec: TensorSpec, *, truncated: Truncated) -> None:
    entry = spec.adapted[-1]
    for side in (left_side, right_side):
        factor = side(entry)
        keys = _factor_keys(trajectory, entry, factor)
        for start, tile_PR in truncation.mixed(truncated, side, length=factor.length):
            for key, transposed in keys:
                if transposed:
                    for row, values in enumerate(tile_PR.T.contiguous()):
                        writer.write(key, (row * factor.length + start) * 4, as_bytes(values))
                else:
                    writer.write(key, start * truncated.rank * 4, as_bytes(tile_PR.contiguous().view(-1)))


def _write_whole(
    writer: ModelWriter, reading: SecondReading, forecast: Forecast, *, space: Workspace, unit: Unit
) -> None:
    trajectory = reading.trajectory
    spec = trajectory.tensors[unit.tensor]
    made, keys = forecast.tensors[spec.name], _whole_keys(trajectory, spec)
    rows = needed_rows(made, len(spec.entries))
    for block in reading.blocks(space, unit, rows):
        for place, deltas in chunks(space, block, spec):
            base, stored = block.base[place], block.stored[:, place]
            chunk = predicted(made, rows, base, stored=stored, deltas=deltas).to(spec.dtype)
            if made.source == "combined" and not bool(torch.isfinite(chunk).all()):
                raise NonFiniteError(
                    f"{spec.name} predicted at step {forecast.target_step} by {forecast.method} leaves the range of"
                    f" {spec.dtype}. Give a nearer target."
                )
            for key in keys:
                writer.write(key, (block.start + place.start) * spec.dtype.itemsize, as_bytes(chunk))
