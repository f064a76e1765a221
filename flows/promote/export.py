"""Export: the champion as a directory or a repository of the Hub, with a README.md: what it is, how it was decided.

The registered files are copied and stay as they are; only the copy has the card.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from deploy import champions, registry
from deploy.registry import RegisteredModelVersion
from flows.decide.gate_results import GateResults, Scored
from flows.errors import ExportError
from flows.promote.publish import CARD, HUB, publish
from relex.drift import OBSERVED
from relex.output import manifest
from relex.output.manifest import Manifest


def export(name: str, out: str, *, tracking_uri: str, downloads: Path) -> str:
    """Write the champion of `name` to `out`, a new directory or `hf://org/repo`, and return where its card is.

    The weights are verified first, a CandidateError where they are not what was registered. ExportError where there is
    no champion, where the directory is there already, and where the Hub refuses. Complete or not there at all.
    """
    directory = None if out.startswith(HUB) else Path(out)
    if directory is not None and directory.exists():
        raise ExportError(f"{out} is there already. Give --out another directory.")
    if unknown := registry.unknown_name(name, tracking_uri=tracking_uri):
        raise ExportError(unknown)
    champion = registry.champion(name, tracking_uri=tracking_uri)
    if champion is None:
        raise ExportError(f"{name} has no champion. Promote a candidate: relex promote {name}.")
    weights = registry.verified(champion, tracking_uri=tracking_uri, downloads=downloads)
    card = write_card(name, champion, manifest.read(weights), tracking_uri=tracking_uri)
    if directory is None:
        return publish(weights, card, out, title=f"{champion.title}, {champion.digest[:12]}")
    unfinished = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(weights, unfinished)
        (unfinished / CARD).write_text(card, encoding="utf-8")
        unfinished.replace(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(directory / CARD)


def write_card(name: str, champion: RegisteredModelVersion, made: Manifest, *, tracking_uri: str) -> str:
    """Return the card as Markdown, its head what the Hub reads: base model, tags, and the results of the gate."""
    reports = registry.gate_reports(champion, tracking_uri=tracking_uri)
    # Of several decisions on the same bytes the last one stands.
    results = GateResults.from_json(reports[-1]) if reports else None
    return f"---\n{_head(name, made, results)}\n---\n\n" + "\n\n".join(
        _body(name, champion, made, results, _reason(name, champion, tracking_uri=tracking_uri))
    )


def _head(name: str, made: Manifest, results: GateResults | None) -> str:
    # A directory of one's own is no model of the Hub's.
    base = made.base.removeprefix(HUB).partition("@")[0] if made.base.startswith(HUB) else None
    data = ModelCardData(
        model_name=name,
        base_model=base,
        library_name="peft" if made.adapter is not None else "transformers",
        pipeline_tag="text-generation",
        tags=["relex", "rlvr", *([] if made.forecast.method == OBSERVED else ["weight-extrapolation"])],
        eval_results=None if results is None else [_result(results.candidate)],
    )
    return str(data.to_yaml())


def _result(scored: Scored) -> EvalResult:
    report = scored.report
    return EvalResult(
        task_type="text-generation",
        dataset_type=report.benchmark,
        dataset_name=report.benchmark,
        dataset_args={"problems": len(report.scores), "sha256": report.benchmark_digest},
        metric_type=report.metric,
        metric_value=round(report.accuracy, 4),
    )


def _body(
    name: str, champion: RegisteredModelVersion, made: Manifest, results: GateResults | None, reason: str
) -> Iterator[str]:
    forecast = made.forecast
    steps = forecast.steps
    yield f"# {name}"
    if forecast.method == OBSERVED:
        yield f"Training step {forecast.target_step} of a reinforcement learning run with verifiable rewards."
        predicted = {}
    else:
        yield (
            f"Weights as they were predicted for training step {forecast.target_step} of a reinforcement learning run"
            f" with verifiable rewards, from its first {steps[-1]} steps. They were not trained to that step."
        )
        length = forecast.norm / (forecast.norm_latest or 1.0)
        predicted = {
            "window": f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}",
            "length of the step from the base": f"{length:.2f} times the latest's",
            "rank-1 energy, R²": f"{forecast.energy:.3f}, {forecast.r_squared:.3f}",
        }
    rows = {
        "base": f"`{made.base.removeprefix(HUB)}`",
        "method": f"`{forecast.method}`",
        "step": str(forecast.target_step),
        **predicted,
        "registered as": f"{champion.title}, digest `{champion.digest[:12]}`",
        "relex": made.versions.get("relex", ""),
    }
    yield "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows.items())])
    yield "## How it was decided"
    if reason:
        yield reason
    if results is not None:
        lines = ["| model | accuracy | problems | benchmark |", "|---|---|---|---|"]
        for scored in (results.candidate, *results.references):
            report = scored.report
            cells = f"{report.accuracy:.4f} | {len(report.scores)} | {report.benchmark}"
            lines.append(f"| {scored.model.title} | {cells} |")
        yield "\n".join(lines)
    yield "`relex.json` has the coefficients, every input's digest and the SHA-256 of every file.\n"


def _reason(name: str, champion: RegisteredModelVersion, *, tracking_uri: str) -> str:
    """Return what the promotion was granted for."""
    trail = champions.history(name, tracking_uri=tracking_uri)
    made = [entry for entry in trail if entry.verdict == "promoted" and entry.digest == champion.digest]
    return made[-1].reason if made else ""
