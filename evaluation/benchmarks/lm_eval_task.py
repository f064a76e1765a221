"""lm-eval task: what lm-eval itself makes of a YAML."""

from typing import Any

from evaluation.errors import BenchmarkError


def load_any_task(name: str, path: str) -> Any:  # lm_eval's Task
    """Return the lm-eval task `name` of a YAML, whatever it scores by; BenchmarkError when it cannot be loaded."""
    from lm_eval.tasks import TaskManager

    try:
        # Never the default index, which takes a quarter of a minute to build.
        return TaskManager(include_defaults=False).load(path)["tasks"][name]
    except (ImportError, AttributeError, KeyError, TypeError, ValueError, OSError, IndexError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise BenchmarkError(f"lm-eval cannot load {path}: {reason}") from error
