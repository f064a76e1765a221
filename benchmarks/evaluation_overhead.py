"""What `evaluate` costs over the bare harness: lm-eval's evaluate with its HFLM, on the same model and problems.

Builds a random Qwen2 with a character tokenizer that hardly ever ends an answer, so both generate the same tokens, and
runs each in a process of its own, in turns: wall and processor time of the whole process with its children, imports and
all, with one problem (the constant start) and with all of them. On a machine that does other things too, processor time
with OMP_NUM_THREADS=1 is what can be compared.

`evaluate` has its child process, the fsynced journal, the sha256 of the model, samples and report in that time, and
nothing in its cache. The harness is given the YAML, so it builds no index of its tasks, and is not asked for the
environment, both of which its command line spends seconds on. The benchmark has a stop sequence that never comes, since
the harness looks for one at every token even where there is none, and `evaluate` does not.

Last, what a decision takes, as a process of its own without servers: base, last observed checkpoint and five candidates
on up to three benchmarks, all of them so small that most of it is what a model costs before its first answer.

    .venv/bin/python -m benchmarks.evaluation_overhead [--problems 512] [--tokens 96] [--batch-size 32] [--rounds 2]
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from evaluation.benchmarks.benchmark import write_benchmark
from tests.helpers.larger_digit import larger, write_models

BARE = """
import sys
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
model, benchmark, batch_size, limit = sys.argv[1:]
tasks = TaskManager(include_defaults=False).load(benchmark)
lm = HFLM(pretrained=model, batch_size=int(batch_size), device="cpu", dtype="float32")
evaluate(lm, tasks, limit=int(limit), bootstrap_iters=0)
"""
OURS = """
import sys
from pathlib import Path
from evaluation.answers.harness import evaluate
model, benchmark, batch_size, limit, cache = sys.argv[1:]
evaluate(Path(model), [benchmark], cache=Path(cache), batch_size=int(batch_size), limit=int(limit))
"""

DECISION = """
import sys
from pathlib import Path
from benchmarks.decisions import decision
from flows.settings import load_settings
made = decision(load_settings(Path(sys.argv[1])), 1)
assert made.gates and len({each.model for each in (*made.report, *made.dropped)}) == 7, made
"""
# Steps of the line from the untrained base to the teacher.
END, WINDOW = 40, 20


def build(directory: Path, *, hidden: int, layers: int) -> Path:
    """Write the model and return its directory."""
    vocabulary = {character: index for index, character in enumerate(" 0123456789+=")}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(vocabulary) + 1,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        eos_token_id=len(vocabulary),
        pad_token_id=len(vocabulary),
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[len(vocabulary)] = 0.0  # never the likeliest, so no answer ends
    model.save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token=" ", eos_token="<eos>"
    )
    tokenizer.save_pretrained(directory)
    return directory


def write_run(root: Path) -> None:
    """Write the checkpoints of a straight run from an untrained base to a teacher, and the benchmarks of a decision."""
    write_models(root)
    base, teacher = (load_file(root / name / "model.safetensors") for name in ("base", "teacher"))
    for step in range(4, WINDOW + 4, 4):
        checkpoint = shutil.copytree(root / "base", root / "run" / f"checkpoint-{step}")
        weights = {name: torch.lerp(start, teacher[name], step / END) for name, start in base.items()}
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
        (checkpoint / "trainer_state.json").write_text("{}")
    for number, name in enumerate(("selection", "gate", "report")):
        write_benchmark(root, name, larger()[number::3], max_new_tokens=2)


def write_config(root: Path, turn: int) -> Path:
    """Write the config of a decision about five candidates, with a state of its own."""
    content = {
        "training_run": "straight",
        "checkpoints": "run",
        "base": "base",
        "window": WINDOW,
        "targets": [24, 28, 32, 36, END],
        "methods": ["relex"],
        "selection": "selection.yaml",
        "gate": "gate.yaml",
        "report": ["report.yaml"],
        "registered_model": "straight",
        "state": f"state-{turn}",
        "batch_size": 25,
    }
    config = root / f"decision-{turn}.yaml"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    return config


def spend(script: str, *arguments: object) -> tuple[float, float]:
    """Return the wall time of a Python process, and the processor time of it and its children."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(Path.cwd())}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Print a table of wall times, and the ratio with and without the constant start."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = build(root / "model", hidden=options.hidden, layers=options.layers)
        problems = [{"prompt": f"{number:06d}+{7 * number:06d}=", "answer": "no"} for number in range(options.problems)]
        benchmark = write_benchmark(root, "plus", problems, max_new_tokens=options.tokens, stop=["\n\n"])
        spent: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for turn in range(options.rounds):
            for limit in (1, options.problems):
                shared = (model, benchmark, options.batch_size, limit)
                spent.setdefault(("bare", limit), []).append(spend(BARE, *shared))
                spent.setdefault(("evaluate", limit), []).append(spend(OURS, *shared, root / f"cache-{turn}-{limit}"))
        write_run(root)
        decided = [spend(DECISION, write_config(root, turn)) for turn in range(options.rounds)]
    print(f"{options.problems} problems of {options.tokens} tokens, the best of {options.rounds} rounds")
    for number, what in enumerate(("wall", "processor")):
        best = {key: min(each[number] for each in values) for key, values in spent.items()}
        print(f"{what + ' time, s':20}{'one problem':>14}{'all':>10}{'all - one':>12}")
        for name in ("bare", "evaluate"):
            start, whole = best[name, 1], best[name, options.problems]
            print(f"{name:20}{start:14.2f}{whole:10.2f}{whole - start:12.2f}")
        bare, ours = (best[name, options.problems] for name in ("bare", "evaluate"))
        bare_start, our_start = (best[name, 1] for name in ("bare", "evaluate"))
        print(
            f"overhead {100 * (ours / bare - 1):+.1f} % of all; start {our_start - bare_start:+.2f} s, a problem"
            f" {100 * ((ours - our_start) / (bare - bare_start) - 1):+.1f} %"
        )
    wall, processor = (min(each) for each in zip(*decided, strict=True))
    print(f"a decision about seven models: {wall:.1f} s, {processor:.1f} s of processor time")


if __name__ == "__main__":
    main()
