"""Training runs of adapters on disk, written by peft itself on tiny models, and the same runs merged by peft."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tests.helpers.trajectories import STEPS, Run, quiet

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_run(
    root: Path,
    *,
    steps: Sequence[int] = STEPS,
    rslora: bool = False,
    dora: bool = False,
    rank: int = 4,
    model: Literal["qwen2", "gpt2"] = "qwen2",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    trainer: Literal["trl", "verl"] = "trl",
    targets: Sequence[str] = LINEAR,
    seed: int = 0,
    **options: Any,
) -> Run:
    """Write root/base and an adapter a step as Trainer or verl does, all quiet; `options` go to LoraConfig."""
    run = Run(root / "base", root / "run")
    with _seeded(seed):
        base = _model(model, tied=tied)
        torch.nn.Module.to(base, dtype)
        base.save_pretrained(run.base)
        quiet(run.base)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=2 * rank,
            use_rslora=rslora,
            use_dora=dora,
            target_modules=list(targets),
            **options,
        )
        adapted = get_peft_model(base, config)
        trained = {name: tensor for name, tensor in adapted.named_parameters() if tensor.requires_grad}
        origin = {name: tensor.detach().clone() for name, tensor in trained.items()}
        along = {name: 0.3 * torch.randn_like(tensor) for name, tensor in origin.items()}
        run.run.mkdir()
        for step in steps:
            for name, tensor in trained.items():
                noise = 0.05 * torch.randn_like(tensor)
                tensor.data.copy_(origin[name] + (along[name] + noise) * (step / steps[-1]))
            _save(adapted, config, run.run, step=step, trainer=trainer)
    return run


def write_merged(run: Run, root: Path, *, steps: Sequence[int] = STEPS) -> Run:
    """Write the base in fp32, and what peft makes of it and every adapter, as Hugging Face directories."""
    merged = Run(root / "base", root / "run")
    with _seeded(0):
        model = load_base(run.base)
        model.save_pretrained(merged.base)
        quiet(merged.base)
        for step in steps:
            path = merged.run / f"checkpoint-{step}"
            merge(run.base, run.run / f"checkpoint-{step}").save_pretrained(path)
            quiet(path)
    return merged


def load_base(path: Path) -> PreTrainedModel:
    """Load a tiny model in fp32."""
    kind = json.loads((path / "config.json").read_bytes())["model_type"]
    family = GPT2LMHeadModel if kind == "gpt2" else Qwen2ForCausalLM
    loaded_model: PreTrainedModel = family.from_pretrained(path, dtype=torch.float32)
    return loaded_model


def merge(base: Path, adapter: Path) -> PreTrainedModel:
    """Return what peft makes of a base, in fp32, and an adapter."""
    with _seeded(0):
        merged: PreTrainedModel = load_adapter(base, adapter).merge_and_unload()
    return merged


def load_adapter(base: Path, adapter: Path) -> PeftModel:
    """Load an adapter onto its base in fp32; a key that is missing is an error."""
    with _seeded(0):
        return PeftModel.from_pretrained(load_base(base), str(adapter))


def logits(model: torch.nn.Module) -> Tensor:
    """Return what a model makes of seven tokens."""
    with torch.no_grad(), _seeded(0):
        result: Tensor = model(torch.arange(7)[None]).logits
    return result


def settings(adapter: Path, **changes: Any) -> None:
    """Change adapter_config.json, and leave it quiet."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    quiet(adapter)


def states(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Return the tensors of a model by name, detached."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _save(adapted: Any, config: LoraConfig, run: Path, *, step: int, trainer: str) -> None:
    if trainer == "trl":
        path = run / f"checkpoint-{step}"
        adapted.save_pretrained(path)
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        quiet(path)
        return
    path = run / f"global_step_{step}" / "actor" / "lora_adapter"
    path.mkdir(parents=True)
    save_file(get_peft_model_state_dict(adapted), path / "adapter_model.safetensors")
    content = asdict(config) | {"target_modules": sorted(config.target_modules or [])}
    (path / "adapter_config.json").write_text(json.dumps(content, indent=4))
    for directory in (path, path.parent, path.parent.parent):
        quiet(directory)
    (run / "latest_checkpointed_iteration.txt").write_text(str(step))
    quiet(run)


@lru_cache
def _config(model: str, *, tied: bool) -> Qwen2Config | GPT2Config:
    if model == "gpt2":
        return GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=tied)
    return Qwen2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )


def _model(model: str, *, tied: bool) -> PreTrainedModel:
    config = _config(model, tied=tied)
    made: PreTrainedModel = GPT2LMHeadModel(config) if isinstance(config, GPT2Config) else Qwen2ForCausalLM(config)
    for name, tensor in made.named_parameters():
        if name.endswith("bias"):  # which start at zero
            tensor.data.normal_(std=0.02)
    return made


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Make peft's own randomness repeatable, and its advice about tied weights silent."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # An adapter must be whole all the same.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        torch.manual_seed(seed)
        yield
