"""Details: lm-eval's own results and samples of one evaluation, as its command line writes them."""

import platform
import shutil
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from evaluation.answers.job import Assignment
from evaluation.verdict.report import Report

if TYPE_CHECKING:
    from evaluation.answers.lm import JournalledLM

# Of the few metrics whose error has no formula; the others' costs nothing.
BOOTSTRAPS = 1000


def write_details(results: dict[str, Any], *, report: Report, lm: "JournalledLM", assignment: Assignment) -> None:
    """Write `results` of lm-eval's evaluate, with samples, so that both files are complete or absent.

    lm-eval's writer does it, with the keys of its simple_evaluate added, and turns the samples into plain text.
    """
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.loggers.utils import add_tokenizer_info, get_git_commit_hash

    samples = results.pop("samples")
    results["config"] = {
        "model": report.settings.get("backend", "hf"),
        "model_args": {"pretrained": report.model, "dtype": report.settings.get("dtype")},
        "model_num_parameters": lm.model.num_parameters(),
        "model_dtype": str(lm.model.dtype),
        "model_revision": "main",
        "model_sha": report.model_digest,
        "batch_size": lm.batch_size,
        "batch_sizes": [],
        "device": report.settings.get("device"),
        "use_cache": None,
        "limit": report.settings.get("limit"),
        "bootstrap_iters": BOOTSTRAPS,
        "gen_kwargs": None,
        # Every batch has a seed of its own, made from its requests.
        "random_seed": None,
        "numpy_seed": None,
        "torch_seed": None,
        "fewshot_seed": None,
    }
    results["git_hash"] = get_git_commit_hash()
    results["date"] = time.time()
    # lm-eval's own takes seconds to ask every package manager.
    results["pretty_env_info"] = f"{platform.platform()}, Python {platform.python_version()}, torch {version('torch')}"
    results["transformers_version"] = version("transformers")
    results["lm_eval_version"] = version("lm_eval")
    results["upper_git_hash"] = None
    add_tokenizer_info(results, lm)
    hidden = assignment.directory / ".details"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    # A name with a suffix: the files then lie in the directory itself.
    tracker = EvaluationTracker(output_path=str(hidden / "all.json"))
    tracker.general_config_tracker.start_time = time.perf_counter() - report.seconds
    tracker.general_config_tracker.log_experiment_args(
        results["config"]["model"], {"pretrained": report.model}, None, None, False
    )
    tracker.save_results_aggregated(results, samples)
    tracker.save_results_samples(assignment.benchmark, samples[assignment.benchmark])
    # It logs what goes wrong and goes on: a file that is not there stops here.
    (written,) = hidden.glob("all_*.json")
    written.replace(assignment.results_path)
    (written,) = hidden.glob("samples_*.jsonl")
    written.replace(assignment.samples_path)
    hidden.rmdir()
