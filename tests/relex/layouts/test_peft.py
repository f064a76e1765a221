"""Adapters read as peft merges them, and refused where they cannot be."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from relex import factor_gram, gram, store
from relex.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointIncompleteError,
    CheckpointMismatchError,
    NonFiniteError,
)
from relex.files.local import LocalDirectory
from relex.files.location import open_directory
from relex.forecast import forecast
from relex.layouts.detection import open_any
from relex.layouts.factors import AdapterWeights, LowRank, Unchanged
from relex.layouts.weights import TensorEntry
from relex.output.materialise import Output, materialise
from relex.predictors import parse_method
from relex.streaming import workspaces
from relex.trajectory import Trajectory, open_trajectory
from tests.helpers.peft_files import load_adapter, load_base, logits, merge, settings, states, write_merged, write_run
from tests.helpers.trajectories import MIB, STEPS, Run, content, least_memory, load, measure, predict, quiet, write

KINDS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "bf16": {"dtype": torch.bfloat16},
    "rslora": {"rslora": True, "rank": 3},
    "dora": {"dora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3},
        "alpha_pattern": {"0.self_attn.v_proj": 5},
    },
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "embeddings": {"targets": ["embed_tokens", "lm_head", "q_proj"]},
    "dora embeddings": {"targets": ["embed_tokens", "q_proj"], "dora": True},
    "all biases": {"bias": "all"},
    "lora biases": {"bias": "lora_only", "dora": True},
    "tied": {"tied": True},
    "tied and saved": {"tied": True, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "conv1d": {"model": "gpt2", "targets": ["c_attn", "c_proj", "c_fc"], "tied": True},
    "conv1d and linear": {"model": "gpt2", "targets": ["c_attn", "c_proj", "lm_head"]},
    "conv1d dora": {"model": "gpt2", "targets": ["c_attn", "c_proj", "wte"], "dora": True},
}
TIED: Mapping[str, Any] = {"tied": True, "targets": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}


def read(weights: AdapterWeights, entry: TensorEntry, start: int = 0, stop: int | None = None) -> Tensor:
    size = entry.dtype.itemsize
    raw = torch.empty(((entry.nbytes // size if stop is None else stop) - start) * size, dtype=torch.uint8)
    weights.read_into(entry, start * size, memoryview(raw.numpy().data))
    return raw.view(entry.dtype)


def adapter(run: Run, step: int) -> Path:
    return run.run / f"checkpoint-{step}"


def rewrite(path: Path, **changed: Tensor | None) -> None:
    """Change tensors of an adapter, None to leave one out; the keys end in the given names, dots as underscores."""
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in list(tensors):
        for ending, tensor in changed.items():
            if name.replace(".", "_").endswith(ending):
                del tensors[name]
                if tensor is not None:
                    tensors[name] = tensor
    save_file(tensors, file)
    quiet(path)


def refusal(run: Run) -> str:
    with pytest.raises(CheckpointError) as caught:
        measure(run.open())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_its_base_is_what_peft_merges(kind: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=STEPS[:2], **KINDS[kind])
    base = states(load_base(run.base))
    for checkpoint in run.open().checkpoints:
        weights = checkpoint.weights
        assert isinstance(weights, AdapterWeights)
        merged = states(merge(run.base, adapter(run, checkpoint.step)))
        assert weights.alias is None or weights.alias.name == "lm_head.weight"
        for name, entry in weights.tensors.items():
            assert entry.name == name
            if isinstance(entry, Unchanged):
                loaded = base[name]
            else:
                loaded = read(weights, entry).view(entry.shape)
                loaded = base[name] + loaded if isinstance(entry, LowRank) else loaded
            assert float((loaded - merged[name]).norm() / merged[name].norm()) < 1e-6, name


@pytest.mark.parametrize("kind", ["plain", "dora", "embeddings", "conv1d dora"])
def test_any_range_of_a_tensor_has_the_bytes_it_has_in_the_whole(kind: str, tmp_path: Path) -> None:
    weights = write_run(tmp_path, steps=STEPS[:2], **KINDS[kind]).open().checkpoints[-1].weights
    assert isinstance(weights, AdapterWeights)
    for entry in weights.tensors.values():
        if isinstance(entry, LowRank):
            whole = read(weights, entry)
            for start, stop in (
                (0, 1),
                (5, 77),
                (len(whole) // 2, len(whole) // 2 + 100),
                (len(whole) - 3, len(whole)),
            ):
                assert torch.equal(read(weights, entry, start, stop), whole[start:stop])


@pytest.mark.parametrize("kind", ["dora", "embeddings", "tied and saved"])
def test_methods_come_to_the_same_on_adapters_and_on_merged_models(kind: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "adapters", **KINDS[kind])
    adapters, models = run.open(), write_merged(run, tmp_path / "merged").open()
    for method in ("hold", "relex:rank=2"):
        ours, theirs = predict(adapters, method), predict(models, method)
        for name, outcome in ours.tensors.items():
            assert outcome.coefficients == pytest.approx(theirs.tensors[name].coefficients, abs=1e-6)
        result, wanted = (
            load(write(trajectory, made, tmp_path / f"{kind} {method} {number}"))
            for number, (trajectory, made) in enumerate([(adapters, ours), (models, theirs)])
        )
        assert result.keys() == wanted.keys()
        for name, tensor in result.items():
            assert float((tensor - wanted[name]).norm() / wanted[name].norm()) < 1e-6, name


@pytest.mark.timeout(60)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "modules_to_save", "target_modules"])
def test_a_regular_expression_that_never_ends_is_not_begun(key: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, tied=True, steps=(10,))
    never = "([a-z_.0-9]+)+!"
    listed = key == "modules_to_save"
    settings(adapter(run, 10), **{key: [never] if listed else never if key == "target_modules" else {never: 2}})
    with pytest.raises(CheckpointMismatchError, match="should match pattern" if listed else "too many ways"):
        open_any(open_directory(adapter(run, 10)), base=store.open_base(run.base))


@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns", "embeddings", "conv1d"])
def test_a_gram_between_factors_is_that_between_deltas(kind: str, tmp_path: Path) -> None:
    trajectory = write_run(tmp_path, **KINDS[kind]).open()
    measured = measure(trajectory)
    between_factors = [spec for spec in trajectory.tensors if factor_gram.pays(spec)]
    assert between_factors
    for spec in between_factors:
        deltas = torch.stack(
            [read(weights, entry).double() for weights, entry in zip(trajectory.adapters, spec.entries, strict=True)]
        )
        dense = deltas @ deltas.T
        assert float((measured.of(spec.name) - dense).abs().max() / dense.abs().max()) < 1e-6


def test_factors_of_a_high_rank_are_multiplied_out(tmp_path: Path) -> None:
    trajectory = write_run(tmp_path, rank=24, targets=["k_proj"]).open()
    adapted = [spec for spec in trajectory.tensors if spec.relative]
    assert adapted
    assert not any(factor_gram.pays(spec) for spec in adapted)
    assert measure(trajectory).of(adapted[0].name).diagonal().gt(0).all()


@pytest.mark.parametrize("kind", ["patterns", "conv1d dora"])
def test_the_bits_of_a_gram_depend_on_nothing_but_the_input(kind: str, tmp_path: Path) -> None:
    trajectory = write_run(tmp_path, **KINDS[kind]).open()
    wanted = measure(trajectory)
    least = least_memory(trajectory)
    for memory, threads in ((least, 1), (256 * MIB, 3)):
        measured = gram.measure(trajectory, memory=memory, threads=threads)
        assert torch.equal(measured.products, wanted.products)
        assert (measured.base_digest, measured.digests) == (wanted.base_digest, wanted.digests)


def test_what_reading_an_adapter_takes_is_part_of_the_budget(tmp_path: Path) -> None:
    trajectory = write_run(tmp_path, **KINDS["conv1d dora"]).open()
    scratch = sum(checkpoint.weights.scratch for checkpoint in trajectory.checkpoints)
    least = least_memory(trajectory)
    for memory in range(least, 2 * least, MIB):
        spaces = workspaces(trajectory, len(trajectory.checkpoints), memory=memory, threads=4)
        assert scratch + sum(space.raw.nbytes + space.deltas.nbytes for space in spaces) <= memory


def test_a_copy_of_the_latest_adapter_that_leaves_the_range_of_its_precision_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    settings(adapter(run, STEPS[-1]), lora_alpha=10**9)
    trajectory = run.open()
    made = forecast(trajectory, measure(trajectory), parse_method("hold"), target_step=200, dtype="float16")
    with pytest.raises(NonFiniteError, match=r"predicted at step 200 by hold leaves the range of torch\.float16"):
        write(trajectory, made, tmp_path / "out")


@pytest.mark.parametrize("kind", ["patterns", "conv1d dora"])
def test_an_extended_gram_of_adapters_equals_one_made_afresh(kind: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, **KINDS[kind])
    short = measure(run.open(window=25))
    longer = run.open()
    extended = gram.measure(longer, memory=64 * MIB, threads=2, known=short)
    assert torch.equal(extended.products, measure(longer).products)


def test_the_digest_is_of_what_an_adapter_holds_and_not_of_where_it_lies(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    wanted = measure(run.open()).digests
    shutil.move(adapter(run, 25), adapter(run, 26))
    state = adapter(run, 26) / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": 26}))
    quiet(adapter(run, 26))
    assert measure(run.open()).digests == wanted
    settings(adapter(run, 26), lora_alpha=9)
    assert [now == then for now, then in zip(measure(run.open()).digests, wanted, strict=True)] == [1, 1, 0, 1, 1]


def test_tensors_that_are_not_adapted_cost_no_reads(tmp_path: Path) -> None:
    trajectory = write_run(tmp_path, targets=["q_proj"]).open()
    counting = [_Counting(Path(str(each.directory))) for each in trajectory.adapters]
    checkpoints = tuple(
        replace(checkpoint, weights=replace(checkpoint.weights, directory=directory))
        for checkpoint, directory in zip(trajectory.checkpoints, counting, strict=True)
    )
    counted = replace(trajectory, checkpoints=checkpoints)
    write(counted, predict(counted), tmp_path / "out")
    for directory in counting:
        size = (directory.path / "adapter_model.safetensors").stat().st_size
        # Once for the digest, once for the Gram, once for the prediction.
        assert 0 < sum(directory.lengths) < 3 * size


@dataclass(frozen=True)
class _Counting(LocalDirectory):
    lengths: list[int] = field(default_factory=list, compare=False)

    def read_into(self, name: str, position: int, buffer: memoryview) -> int:
        self.lengths.append(len(buffer))
        return super().read_into(name, position, buffer)


def test_a_prediction_from_adapters_has_the_same_bytes_in_any_budget(tmp_path: Path) -> None:
    trajectory = write_run(tmp_path, modules_to_save=["norm"], dtype=torch.bfloat16).open()
    made = predict(trajectory)
    wanted = content(write(trajectory, made, tmp_path / "wanted"))
    materialise(trajectory, [Output(made, tmp_path / "found")], memory=least_memory(trajectory), threads=1)
    assert content(tmp_path / "found") == wanted


def test_what_verl_writes_is_read_and_so_is_its_directory_itself(tmp_path: Path) -> None:
    trl, verl = write_run(tmp_path / "trl"), write_run(tmp_path / "verl", trainer="verl")
    assert torch.equal(measure(trl.open()).products, measure(verl.open()).products)
    base = store.open_base(verl.base)
    for place in ("global_step_25", "global_step_25/actor", "global_step_25/actor/lora_adapter"):
        assert open_any(open_directory(verl.run / place), base=base).layout == "peft"


def test_tied_weights_that_are_adapted_together_are_what_the_trainer_has(tmp_path: Path) -> None:
    run = write_run(tmp_path, **TIED)
    trajectory = run.open()
    write(trajectory, predict(trajectory, "hold"), tmp_path / "out")
    # Not merged: peft adds the delta of a tied weight twice.
    trained = load_adapter(run.base, adapter(run, STEPS[-1]))
    assert torch.allclose(logits(load_base(tmp_path / "out")), logits(trained), atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"targets": ["embed_tokens"]}, {"targets": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}],
)
def test_an_adapter_that_unties_tied_weights_is_refused(options: Mapping[str, Any], tmp_path: Path) -> None:
    text = refusal(write_run(tmp_path, tied=True, **options))
    assert "Train with ensure_weight_tying, or from a base whose head is stored apart" in text


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, ["'pissa_niter_16'", "path_initial_model_for_weight_conversion"]),
        ({"init_lora_weights": "olora"}, ["'olora'", "changes the base"]),
        ({"init_lora_weights": "corda"}, ["'corda'", "changes the base"]),
        ({"init_lora_weights": "loftq"}, ["'loftq'", "changes the base"]),
        ({"init_lora_weights": "lora_ga"}, ["'lora_ga'", "changes the base"]),
        ({"peft_type": "LOHA"}, ["'LOHA'", "merge_and_unload"]),
        ({"peft_type": "ADALORA"}, ["'ADALORA'", "merge_and_unload"]),
        ({"use_qalora": True}, ["use_qalora to true", "merge_and_unload"]),
        ({"lora_bias": True}, ["lora_bias to true"]),
        ({"trainable_token_indices": [3]}, ["trainable_token_indices to [3]"]),
        ({"layer_replication": [[0, 2], [1, 2]]}, ["layer_replication to"]),
        ({"an_option_of_next_year": 0.5}, ["an_option_of_next_year to 0.5"]),
        ({"r": 5}, ["has rank 4 in adapter_model.safetensors and 5 in adapter_config.json"]),
        ({"use_dora": True}, ["holds of model.layers.0", "use_dora true"]),
    ],
)
def test_a_kind_of_adapter_that_is_not_read_is_named(
    changes: Mapping[str, Any], names: list[str], tmp_path: Path
) -> None:
    run = write_run(tmp_path, steps=STEPS[:2])
    settings(adapter(run, 20), **changes)
    text = refusal(run)
    assert "step 20 is broken" in text
    for name in names:
        assert name in text


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_a_start_that_leaves_the_base_alone_is_read(start: bool | str, tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=STEPS[:2])
    for step in STEPS[:2]:
        settings(adapter(run, step), init_lora_weights=start)
    assert len(measure(run.open()).steps) == 2


def test_a_module_that_the_base_does_not_have_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=STEPS[:2])
    file = adapter(run, 20) / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "query"): each for name, each in load_file(file).items()}, file)
    quiet(adapter(run, 20))
    assert "the adapter changes model.layers.0.self_attn.query, and the base" in refusal(run)


def test_shapes_that_do_not_fit_are_both_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=STEPS[:2])
    rewrite(adapter(run, 20), layers_0_self_attn_q_proj_lora_A_weight=torch.ones(4, 31))
    text = refusal(run)
    assert "layers.0.self_attn.q_proj has lora_A [4, 31] and lora_B [32, 4]" in text
    assert "has shape [32, 32]" in text


def test_what_was_not_gathered_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=STEPS[:2])
    rewrite(adapter(run, 20), layers_0_self_attn_q_proj_lora_A_weight=torch.ones(0))
    assert "with ZeRO-3 or FSDP, gather before saving" in refusal(run)


def test_half_a_pair_of_factors_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=STEPS[:2])
    rewrite(adapter(run, 20), layers_0_self_attn_q_proj_lora_A_weight=None)
    assert "holds of model.layers.0.self_attn.q_proj only lora_B" in refusal(run)


def test_a_resized_vocabulary_is_refused_with_both_shapes(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=STEPS[:2], modules_to_save=["lm_head"])
    rewrite(adapter(run, 20), lm_head_weight=torch.ones(41, 32))
    text = refusal(run)
    assert "lm_head.weight with shape [41, 32]" in text
    assert "has it with shape [40, 32]" in text


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter_is_not_complete(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=STEPS[:2])
    (adapter(run, 20) / name).unlink()
    quiet(adapter(run, 20))
    assert f"holds an adapter without {name}" in refusal(run)


def test_adapters_and_whole_models_do_not_mix(tmp_path: Path) -> None:
    run = write_run(tmp_path / "adapters")
    merged = write_merged(run, tmp_path / "merged")
    shutil.rmtree(adapter(run, 25))
    shutil.copytree(adapter(merged, 25), adapter(run, 25))
    quiet(adapter(run, 25))
    text = refusal(run)
    assert "step 10 is an adapter" in text
    assert "step 25 a whole model" in text


def test_a_run_that_adapts_other_modules_later_is_refused(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", targets=["q_proj"])
    shutil.rmtree(adapter(first, 40))
    shutil.copytree(adapter(second, 40), adapter(first, 40))
    quiet(adapter(first, 40))
    text = refusal(first)
    assert "left alone in this adapter and adapted in that of step 10" in text


def test_an_adapter_before_its_first_update_is_read(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    file = adapter(run, 10) / "adapter_model.safetensors"
    save_file({name: each * (0 if "lora_B" in name else 1) for name, each in load_file(file).items()}, file)
    quiet(adapter(run, 10))
    assert float(measure(run.open()).products[:, 0].abs().max()) == 0.0


@pytest.mark.parametrize(("step", "part"), [(10, "lora_A"), (25, "lora_A"), (25, "lora_B"), (75, "lora_B")])
def test_a_factor_that_was_lost_is_named(step: int, part: str, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    name = f"layers_1_mlp_up_proj_{part}_weight"
    file = adapter(run, step) / "adapter_model.safetensors"
    printed = next(each for key, each in load_file(file).items() if key.replace(".", "_").endswith(name))
    printed.view(-1)[-9:] = 0.0
    rewrite(adapter(run, step), **{name: printed})
    with pytest.raises(
        CheckpointDamagedError, match=rf"layers\.1\.mlp\.up_proj\.weight is all zeros at step {step}, and"
    ):
        measure(run.open())


def test_a_checkpoint_that_only_looks_like_an_adapter_says_what_is_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=STEPS[:2])
    weights = adapter(run, 20) / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    base = store.open_base(run.base)
    with pytest.raises(CheckpointIncompleteError):
        open_any(open_directory(adapter(run, 20)), base=base)


def test_the_settings_of_an_adapter_must_be_an_object(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=STEPS[:2])
    (adapter(run, 20) / "adapter_config.json").write_text(json.dumps(["LORA"]))
    quiet(adapter(run, 20))
    assert "holds a JSON list" in refusal(run)


def test_a_base_of_another_size_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=STEPS[:2])
    other = write_run(tmp_path / "other", steps=STEPS[:1], model="gpt2", targets=["c_attn"])
    base = store.open_base(other.base)
    with pytest.raises(CheckpointMismatchError, match="Give the base this run was started from"):
        open_any(open_directory(adapter(run, 20)), base=base)


def test_a_trajectory_of_adapters_knows_what_it_is(tmp_path: Path) -> None:
    trajectory: Trajectory = write_run(tmp_path, targets=["q_proj"]).open()
    assert len(trajectory.adapters) == len(STEPS)
    assert [spec.name for spec in trajectory.tensors if spec.relative] == [
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
    ]
    assert open_trajectory(trajectory.base, trajectory.checkpoints).steps == STEPS
