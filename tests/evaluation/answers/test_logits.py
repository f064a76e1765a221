"""Two models in lock-step: at the ends they are one of the two to the bit, elsewhere what a slow loop computes."""

import json
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lm_eval.api.instance import Instance
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM
from typer.testing import CliRunner

from deploy.candidate import verify
from deploy.errors import CandidateError
from evaluation.answers.fingerprint import LogitsExtrapolation, fingerprint
from evaluation.answers.harness import Progress, evaluate
from evaluation.answers.job import Assignment, Job
from evaluation.answers.journal import Journal
from evaluation.answers.lm import JournalledLM
from evaluation.answers.logits_extrapolation import LogitsExtrapolationLM
from evaluation.answers.worker import run as work
from evaluation.benchmarks.benchmark import resolve_benchmark, write_benchmark
from evaluation.errors import BenchmarkError, ModelError, WorkerError
from evaluation.verdict.report import Report
from flows.cli.main import app
from tests.helpers.processes import command_of

PROMPTS = ["1+1=", "77+5=", "0", "12345+678=", "=", "9 9 9 9 9 9", "3+4", "5=5"]
EOS = 2
GREEDY = "do_sample: false\n  temperature: 0.0\n"
SAMPLED = "do_sample: true\n  temperature: 0.7\n  top_p: 0.8\n"


@pytest.fixture(scope="session")
def networks(model: Path, other_model: Path) -> tuple[Qwen2ForCausalLM, Qwen2ForCausalLM]:
    return Qwen2ForCausalLM.from_pretrained(model), Qwen2ForCausalLM.from_pretrained(other_model)


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(model)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="session")
def mixed(model: Path, other_model: Path) -> Callable[..., LogitsExtrapolationLM]:
    """Return a function that loads the pair at an alpha."""

    def load(alpha: float, *, dtype: str = "float32", batch_size: int = 4) -> LogitsExtrapolationLM:
        pair = LogitsExtrapolation(model, other_model, alpha)
        return LogitsExtrapolationLM(pair, device="cpu", dtype=dtype, batch_size=batch_size)

    return load


@pytest.fixture(scope="session")
def two_benchmarks(problems: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return one benchmark answered greedily and one sampled three times a problem, at a temperature and a top-p."""
    directory = tmp_path_factory.mktemp("benchmarks")
    greedy = write_benchmark(directory, "greedy", problems, max_new_tokens=40)
    sampled = write_benchmark(directory, "sampled", problems, max_new_tokens=40)
    text = sampled.read_text()
    assert GREEDY in text
    sampled.write_text(text.replace(GREEDY, SAMPLED) + "repeats: 3\n")
    return [greedy, sampled]


@dataclass(frozen=True)
class Scored:
    """Reports of the two benchmarks, and the lines of their journals."""

    reports: list[Report]
    journals: list[list[str]]

    @property
    def answers(self) -> list[str]:
        """Return every answer in the order of the benchmarks."""
        lines = [line for journal in self.journals for line in journal]
        return [text for line in lines for text, _ in json.loads(line)["answers"]]


def _journals(cache: Path) -> list[list[str]]:
    return [path.read_text().splitlines(keepends=True) for path in sorted(cache.rglob("journal.jsonl"))]


@pytest.fixture(scope="session")
def alone(
    model: Path, other_model: Path, two_benchmarks: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Scored]:
    """Return what the start and the end model score by themselves."""
    scored = []
    for subject in (model, other_model):
        cache = tmp_path_factory.mktemp("alone")
        benchmarks = [resolve_benchmark(path) for path in two_benchmarks]
        assignments = tuple(
            Assignment(each.name, str(each.path), each.digest, model_digest="", settings={}, cache=str(cache))
            for each in benchmarks
        )
        for assignment in assignments:
            assignment.directory.mkdir()
        work(Job(subject, device="cpu", dtype="float32", batch_size=5, limit=None, assignments=assignments), print)
        scored.append(Scored([Report.read(each.report_path) for each in assignments], _journals(cache)))
    return scored


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def at_start(model: Path, other_model: Path, two_benchmarks: list[Path], cache: Path) -> Scored:
    pair = LogitsExtrapolation(model, other_model, 0)
    evaluated = evaluate(pair, two_benchmarks, cache=cache / "evaluations", batch_size=5)
    return Scored([each.report for each in evaluated], _journals(cache))


@pytest.fixture(scope="session")
def killed_at_end(
    model: Path, other_model: Path, two_benchmarks: list[Path], *, at_start: Scored, cache: Path
) -> tuple[str, list[list[str]], Scored]:
    """Return the error of a pair's evaluation that was killed, the journals it left, and how it ended when resumed."""
    before = {*cache.rglob("journal.jsonl")}
    pair = LogitsExtrapolation(model, other_model, 1.0)

    def kill(progress: Progress) -> None:
        for child in psutil.Process().children() if progress.done == 5 else []:
            if "evaluation.answers.worker" in command_of(child):
                child.kill()

    with pytest.raises(WorkerError) as death:
        evaluate(pair, two_benchmarks, cache=cache / "evaluations", batch_size=5, on_progress=kill)
    paths = sorted({*cache.rglob("journal.jsonl")} - before)
    left = [path.read_text().splitlines(keepends=True) for path in paths]
    evaluated = evaluate(pair, two_benchmarks, cache=cache / "evaluations", batch_size=5)
    resumed = sorted({*cache.rglob("journal.jsonl")} - before)
    journals = [path.read_text().splitlines(keepends=True) for path in resumed]
    return str(death.value), left, Scored([each.report for each in evaluated], journals)


def _assert_same(pair: Scored, single: Scored) -> None:
    assert len(pair.answers) == 12 + 36
    assert pair.answers == single.answers
    for ours, theirs in zip(pair.reports, single.reports, strict=True):
        assert (ours.scores, ours.rates, ours.metric) == (theirs.scores, theirs.rates, theirs.metric)


@pytest.mark.slow
def test_a_benchmark_at_alpha_0_is_the_start_model_alone(alone: list[Scored], at_start: Scored) -> None:
    _assert_same(at_start, alone[0])
    assert alone[0].answers != alone[1].answers


@pytest.mark.slow
def test_a_benchmark_at_alpha_1_is_the_end_model_alone_though_it_was_killed(
    alone: list[Scored], killed_at_end: tuple[str, list[list[str]], Scored]
) -> None:
    _assert_same(killed_at_end[2], alone[1])


@pytest.mark.slow
def test_a_killed_evaluation_of_a_pair_resumes_without_paying_twice(
    killed_at_end: tuple[str, list[list[str]], Scored], model: Path, other_model: Path
) -> None:
    death, left, resumed = killed_at_end
    assert f"scoring logits of {other_model} from {model} at alpha 1.0 on greedy, sampled was killed" in death
    kept = [line for journal in left for line in journal if line.endswith("\n")]
    everything = [line for journal in resumed.journals for line in journal]
    assert 1 <= len(kept) < len(everything)
    assert everything[: len(kept)] == kept
    assert len(everything) == len({json.loads(line)["chunk"] for line in everything}) == 3 + 8


@pytest.mark.slow
def test_two_alphas_never_share_a_journal(
    at_start: Scored, killed_at_end: tuple[str, list[list[str]], Scored], cache: Path
) -> None:
    assert len(list(cache.rglob("journal.jsonl"))) == 4
    assert at_start.reports[0].model_digest != killed_at_end[2].reports[0].model_digest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("alpha", "end"), [(0.0, 0), (1.0, 1)])
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_p": 0.8}])
def test_every_choice_and_logit_at_either_end_is_that_models_own(
    mixed: Callable[..., LogitsExtrapolationLM],
    networks: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    *,
    alpha: float,
    end: int,
    dtype: str,
    sampling: dict[str, float],
) -> None:
    alone = Qwen2ForCausalLM.from_pretrained(networks[end].name_or_path, dtype=getattr(torch, dtype))
    pair = mixed(alpha, dtype=dtype).model
    alone.generation_config = pair.generation_config
    ours, theirs = (_generate(network, tokenizer, sampling) for network in (pair, alone))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(one, other) for one, other in zip(ours.logits, theirs.logits, strict=True))


def _generate(network: Any, tokenizer: PreTrainedTokenizerFast, sampling: dict[str, float]) -> Any:
    torch.manual_seed(3)
    return network.generate(
        **tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt"),
        max_new_tokens=30,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **sampling,
    )


def reference(
    networks: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM],
    prompts: Sequence[Sequence[int]],
    alpha: float,
    *,
    temperature: float,
    top_p: float,
    new: int,
) -> list[list[int]]:
    """Return the answers' tokens, recomputing both models' logits of each unpadded row from its beginning every step.

    Temperature 0 is greedy. One draw a row and step, whether the row has ended or not.
    """
    rows = [list(prompt) for prompt in prompts]
    ended = [False for _ in rows]
    for _ in range(new):
        distributions = torch.stack([_distribution(networks, row, alpha, temperature, top_p) for row in rows])
        draws = torch.multinomial(distributions, 1)[:, 0] if temperature else distributions.argmax(-1)
        for number, token in enumerate(draws.tolist()):
            if not ended[number]:
                rows[number].append(token)
                ended[number] = token == EOS
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def _distribution(
    networks: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM],
    row: list[int],
    alpha: float,
    temperature: float,
    top_p: float,
) -> Tensor:
    with torch.no_grad():
        start, end = (network(torch.tensor([row])).logits[0, -1].double() for network in networks)
    probabilities = ((start + alpha * (end - start)) / (temperature or 1.0)).softmax(-1)
    order = probabilities.argsort(descending=True)
    # The likeliest tokens until their sum reaches top_p, the one that crosses it included.
    kept = order[probabilities[order].cumsum(0) - probabilities[order] < top_p]
    nucleus = torch.zeros_like(probabilities)
    nucleus[kept] = probabilities[kept]
    return (nucleus / nucleus.sum()).float()


@pytest.mark.parametrize("alpha", [1.7, -0.4, 0.3])
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_p": 0.8}])
def test_a_batch_of_prompts_of_all_lengths_is_decoded_as_by_a_slow_loop_over_single_rows(
    mixed: Callable[..., LogitsExtrapolationLM],
    networks: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    alpha: float,
    sampling: dict[str, float],
) -> None:
    generated = _generate(mixed(alpha).model, tokenizer, sampling)
    torch.manual_seed(3)
    expected = reference(
        networks,
        tokenizer(PROMPTS)["input_ids"],
        alpha,
        temperature=sampling.get("temperature", 0.0),
        top_p=sampling.get("top_p", 1.0),
        new=30,
    )
    width = generated.sequences.shape[1] - max(map(len, expected))
    tokens = [row[: len(wanted)] for row, wanted in zip(generated.sequences[:, width:].tolist(), expected, strict=True)]
    assert tokens == expected
    assert any(row[-1] == EOS for row in expected)
    assert any(row[-1] != EOS for row in expected)


def _requests(kind: str, arguments: Sequence[tuple[object, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("ours", number, 1))
        for number, each in enumerate(arguments)
    ]


GENERATION = {"until": [], "max_gen_toks": 30, "do_sample": False, "temperature": 0.0}


def test_answers_through_the_journal_are_the_same_batched_one_by_one_and_by_the_slow_loop(
    mixed: Callable[..., LogitsExtrapolationLM],
    networks: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    requests = _requests("generate_until", [(prompt, GENERATION) for prompt in PROMPTS])
    expected = reference(networks, tokenizer(PROMPTS)["input_ids"], 1.7, temperature=0.0, top_p=1.0, new=30)
    for batch_size in (1, 3):
        lm = mixed(1.7, batch_size=batch_size)
        with Journal(tmp_path / f"{batch_size}.jsonl") as journal:
            lm.keep(journal, lambda done, total: None)
            assert lm.generate_until(requests) == tokenizer.batch_decode(expected, skip_special_tokens=True)
        assert lm.truncated == [row[-1] != EOS for row in expected]


def _likelihoods(lm: JournalledLM, path: Path) -> list[object]:
    pairs = [(prompt, choice) for prompt in PROMPTS for choice in ("12", "345", "6")]
    with Journal(path) as journal:
        lm.keep(journal, lambda done, total: None)
        return [
            *lm.loglikelihood(_requests("loglikelihood", pairs)),
            *lm.loglikelihood_rolling(_requests("loglikelihood_rolling", [(prompt,) for prompt in PROMPTS])),
        ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("alpha", [0, 1])
def test_likelihoods_at_either_end_are_that_models_own(
    mixed: Callable[..., LogitsExtrapolationLM],
    networks: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM],
    *,
    alpha: int,
    dtype: str,
    tmp_path: Path,
) -> None:
    alone = JournalledLM(Path(str(networks[alpha].name_or_path)), device="cpu", dtype=dtype, batch_size=4)
    expected = _likelihoods(alone, tmp_path / "alone.jsonl")
    assert _likelihoods(mixed(float(alpha), dtype=dtype), tmp_path / "pair.jsonl") == expected


def test_likelihoods_beyond_the_end_are_those_of_the_mix(
    mixed: Callable[..., LogitsExtrapolationLM],
    networks: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal:
        lm = mixed(1.7)
        lm.keep(journal, lambda done, total: None)
        ((likelihood, greedy),) = lm.loglikelihood(_requests("loglikelihood", [("12+3", "45=")]))
    tokens = torch.tensor(tokenizer(["12+345="])["input_ids"])
    with torch.no_grad():
        start, end = (network(tokens).logits[0, :-1].double() for network in networks)
    chosen = (start + 1.7 * (end - start)).log_softmax(-1)[-3:]
    assert likelihood == pytest.approx(float(chosen.gather(1, tokens[0, -3:, None]).sum()), rel=1e-5)
    assert greedy == bool((chosen.argmax(-1) == tokens[0, -3:]).all())


def test_the_start_models_cache_is_freed_with_the_end_models(
    mixed: Callable[..., LogitsExtrapolationLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = mixed(1.7)
    kept = _generate(lm.model, tokenizer, {"do_sample": False})
    (cache,) = lm._start_caches.values()
    assert cache.get_seq_length() == kept.past_key_values.get_seq_length()
    del kept
    assert not lm._start_caches


def test_penalties_are_applied_to_the_mix(
    mixed: Callable[..., LogitsExtrapolationLM],
    networks: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # Of a penalty on the end model's logits alone, nothing is left at alpha 0.
    pair = mixed(0.0).model
    networks[0].generation_config = pair.generation_config
    penalised = {"do_sample": False, "repetition_penalty": 1.5}
    ours, theirs = (_generate(network, tokenizer, penalised) for network in (pair, networks[0]))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert not torch.equal(ours.sequences, _generate(pair, tokenizer, {"do_sample": False}).sequences)


def test_the_pair_is_its_two_models_and_alpha_wherever_they_lie(model: Path, other_model: Path, tmp_path: Path) -> None:
    pair = LogitsExtrapolation(model, other_model, 2)
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    same = [replace(pair, alpha=2.0), replace(pair, start=copy)]
    others = [
        replace(pair, alpha=2.0000001),
        replace(pair, start=other_model),
        replace(pair, end=model),
        LogitsExtrapolation(other_model, model, 2),
    ]
    assert {fingerprint(each).digest for each in same} == {fingerprint(pair).digest}
    singles = {fingerprint(each).digest for each in (model, other_model)}
    assert len(singles | {fingerprint(each).digest for each in [pair, *others]}) == 7


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(model: Path, other_model: Path, alpha: float) -> None:
    with pytest.raises(ModelError, match=r"alpha is (nan|inf) and must be a finite number"):
        fingerprint(LogitsExtrapolation(model, other_model, alpha))


def test_models_stored_in_two_dtypes_need_one_to_run_in(
    model: Path, other_model: Path, two_benchmarks: list[Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    with pytest.raises(ModelError, match=r"is float32 and bfloat16 and must be one of .*: pass dtype"):
        evaluate(LogitsExtrapolation(copy, other_model, 2.0), two_benchmarks, cache=tmp_path / "cache")


def _rewrite(directory: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((directory / file).read_text())
    change(content)
    (directory / file).write_text(json.dumps(content))


def _load(start: Path, end: Path) -> LogitsExtrapolationLM:
    return LogitsExtrapolationLM(LogitsExtrapolation(start, end, 2.0), device="cpu", dtype="float32", batch_size=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer["model"]["vocab"].update({"7": 11, "8": 10}),
        lambda tokenizer: tokenizer["post_processor"]["single"].pop(0),
    ],
    ids=["two tokens swapped", "no BOS"],
)
def test_another_tokenizer_is_refused_with_both(
    model: Path, other_model: Path, change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    _rewrite(copy, "tokenizer.json", change)
    with pytest.raises(ModelError, match=rf"digest is \w{{12}} for {other_model} and \w{{12}} for {copy}: logits are"):
        _load(copy, other_model)


def test_another_vocabulary_is_refused_with_both(
    model: Path, other_model: Path, networks: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    network = deepcopy(networks[0])
    network.resize_token_embeddings(20)
    network.save_pretrained(copy)
    with pytest.raises(ModelError, match=rf"vocab_size is 16 for {other_model} and 20 for {copy}: logits are mixed"):
        _load(copy, other_model)


def test_how_a_trainer_padded_its_batches_is_no_other_tokenizer(model: Path, other_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    cut = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    _rewrite(copy, "tokenizer.json", lambda tokenizer: tokenizer.update(truncation=cut))
    _load(copy, other_model)


def test_an_answer_ends_where_either_model_ends_it_and_fits_into_both(
    model: Path, other_model: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    _rewrite(copy, "generation_config.json", lambda generation: generation.update(eos_token_id=[2, 9]))
    _rewrite(copy, "config.json", lambda config: config.update(max_position_embeddings=40))
    lm = _load(copy, other_model)
    assert lm.model.generation_config.eos_token_id == [2, 9]
    with Journal(tmp_path / "journal.jsonl") as journal:
        lm.keep(journal, lambda done, total: None)
        texts = lm.generate_until(_requests("generate_until", [(prompt, GENERATION) for prompt in PROMPTS[:3]]))
        assert not any("6" in text for text in texts)
        with pytest.raises(BenchmarkError, match="has 12 tokens and may generate 30, more than the 40"):
            lm.generate_until(_requests("generate_until", [("12345678901", GENERATION)]))


def test_decoding_that_rewrites_the_cache_is_refused(mixed: Callable[..., LogitsExtrapolationLM]) -> None:
    requests = _requests("generate_until", [("1+1=", {**GENERATION, "num_beams": 3})])
    with pytest.raises(
        BenchmarkError, match="ours decodes by beam_search and two models in lock-step decode by greedy"
    ):
        mixed(1.7).generate_until(requests)


def test_the_command_line_names_a_pair_by_where_the_logits_come_from(
    at_start: Scored,
    model: Path,
    other_model: Path,
    *,
    two_benchmarks: list[Path],
    cache: Path,
) -> None:
    command = ["evaluate", str(other_model), "--benchmark", str(two_benchmarks[0]), "--cache", str(cache)]
    command += ["--batch-size", "5", "--logits-from", str(model)]
    shown = CliRunner().invoke(app, [*command, "--alpha", "0", "--json"])
    (report,) = json.loads(shown.stdout)
    assert report["model"] == f"logits of {other_model} from {model} at alpha 0.0"
    assert report["model_digest"] == at_start.reports[0].model_digest
    alone = CliRunner().invoke(app, command)
    assert alone.exit_code == 2
    assert "--logits-from and --alpha are given together" in " ".join(alone.stderr.split())


def test_a_pair_cannot_be_registered(at_start: Scored) -> None:
    with pytest.raises(CandidateError, match=r"relex\.json cannot be read .* Name a predicted directory"):
        verify(Path(at_start.reports[0].model))
