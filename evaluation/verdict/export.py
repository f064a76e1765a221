"""Export: the table and the files that lm-eval's own command line would have made of an evaluation."""

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from evaluation.errors import ReportError
from evaluation.verdict.bounds import interval_name, mean_interval
from evaluation.verdict.report import Evaluated
from evaluation.verdict.samples import read_samples


@dataclass(frozen=True)
class MetricRow:
    """One line of lm-eval's table: a metric of a task after a filter.

    `interval` is the 95 % interval of a mean over problems, as in Report.interval, and `interval_name` says which; None
    and empty for any other aggregate.
    """

    task: str
    version: str
    filter: str
    n_shot: str
    metric: str
    higher_is_better: bool | None
    value: float
    stderr: float | None
    interval: tuple[float, float] | None
    interval_name: str


def read_rows(evaluated: Evaluated) -> list[MetricRow]:
    """Return the table of one evaluation, the metric that decides first."""
    results = _read(evaluated.results)
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for sample in read_samples(evaluated.samples):
        for metric in sample["metrics"]:
            if isinstance(sample[metric], (int, float)):
                scores[metric, sample["filter"]].append(float(sample[metric]))
    rows = []
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric, _, chosen = name.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = metrics.get(f"{metric}_stderr,{chosen}")
            each = scores[metric, chosen]
            is_mean = each and math.isclose(math.fsum(each) / len(each), value, abs_tol=1e-9)
            rows.append(
                MetricRow(
                    task=task,
                    version=str(results["versions"].get(task, "")),
                    filter=chosen,
                    n_shot=str(results["n-shot"].get(task, "")),
                    metric=metric,
                    higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                    interval=mean_interval(each) if is_mean else None,
                    interval_name=interval_name(each) if is_mean else "",
                )
            )
    return sorted(rows, key=lambda row: row.metric != evaluated.report.metric)


def export(evaluated: Sequence[Evaluated], directory: Path) -> list[Path]:
    """Write results_*.json and a samples_*.jsonl a benchmark below `directory`/model, as lm-eval names them.

    All are of one model. Returns the paths, the results first. Raises ReportError for results that cannot be read.
    """
    merged: dict[str, Any] = {}
    for each in evaluated:
        for name, value in _read(each.results).items():
            if isinstance(value, dict) and name != "config":
                merged.setdefault(name, {}).update(value)
            else:
                merged.setdefault(name, value)
    model = evaluated[0].report.model
    # The content decides, but the path in results from the cache may be that of a copy.
    merged["model_name"] = model
    merged["model_name_sanitized"] = re.sub(r'["<>:/|\\?*\[\]]+', "__", model)
    merged["config"]["model_args"]["pretrained"] = model
    merged["total_evaluation_time_seconds"] = str(math.fsum(each.report.seconds for each in evaluated))
    target = directory / merged["model_name_sanitized"]
    target.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().isoformat().replace(":", "-")
    paths = [target / f"results_{stamp}.json"]
    paths[0].write_text(json.dumps(merged, indent=2, ensure_ascii=False), encoding="utf-8")
    for each in evaluated:
        (task,) = _read(each.results)["results"]
        paths.append(target / f"samples_{task}_{stamp}.jsonl")
        shutil.copyfile(each.samples, paths[-1])
    return paths


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} cannot be read: {error}. Delete it and evaluate again.") from error
    return content
