"""Backend: what answers, transformers (hf) or vLLM, spelled `NAME` or `NAME:parameter=value,…`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from evaluation.errors import BackendError
from evaluation.verdict.report import Setting

# What is answered and journalled together. vLLM keeps RUNNING requests at work and takes up the next as one ends; what
# is lost is the end of a batch, when the longest answers run alone, against four times as many rounds as a batch of
# RUNNING would be. A kill costs one batch, minutes at most; a batch is also what one GPU of several takes.
BATCH_SIZES = {"hf": 64, "vllm": 1024}
RUNNING = 256
PARAMETERS = {
    "hf": ("share_device",),
    "vllm": ("tensor_parallel_size", "gpu_memory_utilization", "max_model_len", "share_device"),
}


@dataclass(frozen=True)
class Backend:
    """What answers, and its parameters: the last four are vLLM's own, by vLLM's names.

    One engine spans `tensor_parallel_size` GPUs; more GPUs are as many engines as fit, each with problems of its own.
    `share_device` allows GPUs that another evaluation of this machine uses.
    """

    name: Literal["hf", "vllm"] = "hf"
    share_device: bool = False
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None

    def settings(self) -> Mapping[str, Setting]:
        """Return what may change an answer; BackendError when vLLM is asked for and missing.

        How much memory vLLM may use changes how many requests run at once, never which are asked together.
        """
        if self.name == "hf":
            return {}
        try:
            installed = version("vllm")
        except PackageNotFoundError:
            raise BackendError("backend is vllm and vLLM is not installed: pip install vllm, or pass hf.") from None
        return {
            "backend": self.name,
            "tensor_parallel_size": self.tensor_parallel_size,
            "max_model_len": self.max_model_len,
            "vllm version": installed,
        }


HF = Backend()


def parse_backend(text: str) -> Backend:
    """Return the backend of its spelling; BackendError for an unknown name or parameter, or a value out of range."""
    name, _, given = text.partition(":")
    if name not in PARAMETERS:
        raise BackendError(f"backend is {name} and must be one of {', '.join(PARAMETERS)}.")
    values: dict[str, object] = {"name": name}
    for parameter in given.split(",") if given else []:
        key, _, value = parameter.partition("=")
        if key not in PARAMETERS[name]:
            raise BackendError(f"backend {name} has no parameter {key}: it has {', '.join(PARAMETERS[name])}.")
        values[key] = _value(text, key, value)
    return dataclasses.replace(HF, **values)  # type: ignore[arg-type]  # _value has read each by its name


def _value(text: str, key: str, value: str) -> bool | int | float:
    try:
        if key == "share_device":
            return {"true": True, "false": False}[value]
        if key == "gpu_memory_utilization":
            share = float(value)
            if 0 < share <= 1:
                return share
        elif int(value) > 0:
            return int(value)
    except (KeyError, ValueError):
        pass
    expected = {"share_device": "true or false", "gpu_memory_utilization": "a share in 0..1"}
    raise BackendError(f"backend {text}: {key} is {value} and must be {expected.get(key, 'a whole number above 0')}.")
