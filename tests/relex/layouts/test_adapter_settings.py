"""adapter_config.json as peft reads it: whatever it says, it is refused in one line or read as peft loads it.

`make test` tries a few mutations, the slow test RELEX_FAULTS of each kind of adapter.
"""

import copy
import json
import os
import random
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from relex import store
from relex.errors import CheckpointError, CheckpointMismatchError
from relex.files.location import open_directory
from relex.layouts.adapter_settings import read_settings
from relex.layouts.detection import open_any
from relex.layouts.factors import AdapterWeights, LowRank, Unchanged
from relex.layouts.weights import Weights
from tests.helpers import peft_files
from tests.helpers.random_faults import mutated
from tests.relex.layouts.test_peft import KINDS, read

CASES = int(os.environ.get("RELEX_FAULTS", "100"))
MUTATED = ("patterns", "dora", "modules_to_save", "conv1d", "lora biases", "embeddings")
WRITTEN: Mapping[str, Any] = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
MODULES = tuple(f"model.layers.{layer}.self_attn.{name}" for layer in range(12) for name in ("q_proj", "k_proj"))


def loaded_by_peft(model: torch.nn.Module, adapter: Path) -> Mapping[str, Tensor] | None:
    """Return what peft makes of a base and an adapter, None when it raises anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = PeftModel.from_pretrained(copy.deepcopy(model), str(adapter)).merge_and_unload()
    except Exception:  # noqa: BLE001 - whatever it is
        return None
    return peft_files.states(merged)


def loaded_here(base: Weights, plain: Mapping[str, Tensor], adapter: Path) -> Mapping[str, Tensor] | None:
    """Return what is read of them here, None when it is refused in one line."""
    try:
        weights = open_any(open_directory(adapter), base=base)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017 - what is not refused is looked at below
        return None
    assert isinstance(weights, AdapterWeights)
    result = {}
    for name, entry in weights.tensors.items():
        tensor = plain[name] if isinstance(entry, Unchanged) else read(weights, entry).view(entry.shape)
        result[name] = plain[name] + tensor if isinstance(entry, LowRank) else tensor
    return result


def alike(ones: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return all(float((one - others[name]).norm() / others[name].norm()) < 1e-5 for name, one in ones.items())


@pytest.mark.parametrize("cases", [10, pytest.param(CASES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MUTATED)
def test_mutated_settings_are_refused_or_read_as_peft_does(kind: str, cases: int, tmp_path: Path) -> None:
    run = peft_files.write_run(tmp_path, steps=(10,), **KINDS[kind])
    good = run.run / "checkpoint-10"
    model, base = peft_files.load_base(run.base), store.open_base(run.base)
    plain, truth = peft_files.states(model), loaded_by_peft(model, good)
    assert truth is not None
    refused = 0
    for number in range(cases):
        case = tmp_path / "case"
        shutil.copytree(good, case)
        content = json.loads((case / "adapter_config.json").read_bytes())
        change = mutated(content, random.Random(f"{kind} {number}"))
        (case / "adapter_config.json").write_text(json.dumps(content))
        here, theirs = loaded_here(base, plain, case), loaded_by_peft(model, case)
        # What keeps peft from loading at all, as a dropout of its own kind, may be of no account for what is stored.
        assert here is None or alike(here, truth if theirs is None else theirs), (number, change)
        refused += here is None
        shutil.rmtree(case)
    assert cases // 5 < refused < cases


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": "4"}, r"^there: r is '4' \(Input should be a valid integer\)\. Save the adapter again\.$"),
        ({"r": True}, "r is True"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": [16]}, r"lora_alpha is \[16\]"),
        ({"rank_pattern": {"q_proj": "many"}}, "rank_pattern is {'q_proj': 'many'}"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern is {'q_proj': -1}"),
        ({"fan_in_fan_out": 7}, "fan_in_fan_out is 7"),
        ({"use_dora": "no"}, "use_dora is 'no'"),
        (
            {"target_modules": None},
            r"target_modules is None \(Input should be a valid list; Input should be a valid str",
        ),
        ({"init_lora_weights": [True]}, r"has init_lora_weights \[True\]"),
        ({"peft_type": ["LORA"]}, r"has peft_type \['LORA'\]"),
        ({"kasa_config": {}}, "sets kasa_config to {}, which is not read"),
        ({"a" * 9999: 1}, "sets a{200} to 1, "),
    ],
)
def test_what_peft_does_not_write_is_named_with_its_value(changes: Mapping[str, Any], said: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=said) as caught:
        read_settings({**WRITTEN, **changes}, where="there")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_settings_without_targets_are_refused() -> None:
    with pytest.raises(CheckpointMismatchError, match=r"^there has no target_modules\."):
        read_settings({"peft_type": "LORA"}, where="there")


@pytest.mark.parametrize(
    ("changes", "layers", "names"),
    [
        ({"target_modules": ["q_proj", "k_proj"]}, range(12), "qk"),
        ({"target_modules": r".*layers\.[0-4]\..*q_proj"}, range(5), "q"),
        ({"target_modules": ["proj"]}, (), "qk"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 11]}, (1, 11), "q"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": "layers"}, (3,), "q"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": ["h"]}, (), "q"),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, range(12), "q"),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.k_.*"}, range(12), "q"),
        ({"target_modules": ["q_proj", "k_proj"], "modules_to_save": ["k_proj"]}, range(12), "q"),
    ],
)
def test_modules_are_targeted_as_peft_targets_them(changes: Mapping[str, Any], layers: Any, names: str) -> None:
    targeted = read_settings({**WRITTEN, **changes}, where="there").targets(MODULES, where="there")
    assert targeted == {f"model.layers.{layer}.self_attn.{name}_proj" for layer in layers for name in names}


def test_factors_that_the_settings_do_not_target_are_refused(tmp_path: Path) -> None:
    run = peft_files.write_run(tmp_path, steps=(10,))
    peft_files.settings(run.run / "checkpoint-10", target_modules=["q_proj"])
    with pytest.raises(CheckpointMismatchError, match=r"does not target model\.layers\.0\.mlp\.down_proj, which has"):
        open_any(open_directory(run.run / "checkpoint-10"), base=store.open_base(run.base))


def test_fan_in_fan_out_turns_no_square_layer_of_another_model(tmp_path: Path) -> None:
    run = peft_files.write_run(tmp_path, steps=(10,))
    peft_files.settings(run.run / "checkpoint-10", fan_in_fan_out=True)
    with pytest.raises(CheckpointMismatchError, match=r"sets fan_in_fan_out, and of .*, which is square, in a 'qwen2'"):
        open_any(open_directory(run.run / "checkpoint-10"), base=store.open_base(run.base))
