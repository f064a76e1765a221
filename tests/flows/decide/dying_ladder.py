"""A decision by a ladder, without servers, cut short with kill -9: `dying_ladder.py CONFIG N`.

It dies in the Nth evaluation, after its first answers; N of 0 runs to the end.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from evaluation.answers.harness import Progress
from flows.decide.predict import predict, write_rungs
from flows.decide.procedure import Stages, decide
from flows.decide.score import reports
from flows.decide.stages import count_problems, diverge_models, gate_model, guard_model
from flows.search.ladder import Answered, answered, score
from flows.settings import Settings, load_settings
from flows.state.decision import Model, Score
from flows.state.windows import window_key
from relex.store import open_base, scan


def main(path: str, last: int) -> None:
    settings = load_settings(Path(path))
    evaluated: list[Model] = []

    def on_progress(_: Progress) -> None:
        if len(evaluated) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def score_model(settings: Settings, model: Model, benchmarks: list[str], limit: int | None) -> list[Score]:
        evaluated.append(model)
        scored = reports(settings, model, benchmarks, limit=limit, on_progress=on_progress)
        return [score(model, report) for report in scored]

    def answer(settings: Settings, model: Model, limit: int | None) -> Answered:
        evaluated.append(model)
        return answered(model, reports(settings, model, [settings.selection], limit=limit, on_progress=on_progress)[0])

    stages = Stages(
        problems=count_problems,
        predict=predict,
        write=write_rungs,
        answer=answer,
        base=lambda settings: Model("base", 0, settings.base),
        score=score_model,
        champion=lambda _: [],
        gate=gate_model,
        guard=guard_model,
        divergence=diverge_models,
    )
    stored = list(scan(settings.store, open_base(settings.base), now=time.time()))
    key = window_key(settings, open_base(settings.base), stored)
    decision = decide(settings, [checkpoint.step for checkpoint in stored], key, stages, attempt=(1, 1))
    sys.stdout.write(json.dumps(decision.to_json()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
