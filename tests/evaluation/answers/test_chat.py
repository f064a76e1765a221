"""A model's own chat template, and answers that end where its context does."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from evaluation.answers import chat_template
from evaluation.answers.chat_template import rendered
from evaluation.answers.job import Assignment
from evaluation.answers.journal import Journal
from evaluation.answers.lm import JournalledLM
from evaluation.answers.worker import load_task, score
from evaluation.benchmarks.benchmark import resolve_benchmark, write_benchmark
from evaluation.errors import ModelError
from evaluation.verdict.report import Report

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}="


@pytest.fixture(scope="module")
def templated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model with a chat template that writes the first token itself, as most do."""
    copy = Path(shutil.copytree(model, tmp_path_factory.mktemp("models") / "templated"))
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


def run(model: Path, benchmark: Path, directory: Path, *, batch_size: int = 4) -> Report:
    lm = JournalledLM(model, device="cpu", dtype="float32", batch_size=batch_size)
    resolved = resolve_benchmark(benchmark)
    wanted = Assignment(resolved.name, str(resolved.path), resolved.digest, "m", {}, "unused")
    with Journal(directory / "journal") as journal:
        lm.keep(journal, lambda done, total: None)
        return score(lm, load_task(wanted), assignment=wanted, model=str(model), limit=None, journal=journal)[0]


def answered(ask: Callable[[str], tuple[str, bool]], prompts: list[str]) -> list[dict[str, str]]:
    """Return problems without what the template adds, answered as the prompt with it is."""
    return [{"prompt": prompt, "answer": ask(f"{prompt}=")[0]} for prompt in prompts]


def test_a_template_is_applied_and_the_first_token_written_once(
    templated: Path, ask: Callable[[str], tuple[str, bool]], tmp_path: Path
) -> None:
    path = write_benchmark(tmp_path, "sums", answered(ask, ["1+1", "23+4", "5+66"]), max_new_tokens=40)
    without = run(templated, path, tmp_path)
    path.write_text(path.read_text() + "metadata: {chat_template: true}\n")
    assert run(templated, path, tmp_path).accuracy == 1.0
    assert without.accuracy < 1.0


def test_a_model_without_a_template_is_refused(model: Path, tmp_path: Path) -> None:
    path = write_benchmark(tmp_path, "sums", [{"prompt": "1+1", "answer": "2"}], max_new_tokens=4)
    path.write_text(path.read_text() + "metadata: {chat_template: true}\n")
    with pytest.raises(ModelError, match="brings no chat template for sums: score it without @chat"):
        run(model, path, tmp_path)


NEVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "a loop without end": (NEVER, "takes more than 0.2 seconds for one prompt"),
    "three billion letters": ("{{ 'x' * 3000000000 }}", r"makes too much of one prompt \(MemoryError\)"),
    "as many later": ("{{ messages[0]['content'] * 3000000000 }}", r"makes too much of one prompt \(MemoryError\)"),
    "a text doubled": (
        "{% set n = namespace(t='xx') %}{% for _ in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
        "makes too much",
    ),
    "a long prompt": ("{{ 'x' * 5000000 }}", "makes 5000000 characters of one prompt"),
    "a large range": ("{% for _ in range(10 ** 9) %}{% endfor %}", r"makes too much of one prompt \(OverflowError\)"),
    "no template": ("{% for %}", "fails: Expected an expression"),
    "its own refusal": ("{{ raise_exception('no such role') }}", "fails: no such role"),
    "what it may not do": ("{{ ''.__class__.__mro__ }}", "fails: .*unsafe"),
    "nested": ("{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}", "is nested too deep"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("template", "said"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_template_that_is_too_much_is_refused_in_one_line(
    model: Path, template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.2 if template == NEVER else 5.0)
    monkeypatch.setattr(chat_template, "_MOST_MEMORY", 64 << 20)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template

    def render() -> str:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": "1+1"}], tokenize=False))

    with pytest.raises(ModelError, match=f"^the chat template of m {said}.*: score the model without @chat") as caught:
        rendered(render, model="m")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_template_is_bounded_where_the_model_is_scored(
    templated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    endless = Path(shutil.copytree(templated, tmp_path / "endless"))
    (endless / "chat_template.jinja").write_text(NEVER)
    path = write_benchmark(tmp_path, "sums", [{"prompt": "1+1", "answer": "2"}], max_new_tokens=4)
    path.write_text(path.read_text() + "metadata: {chat_template: true}\n")
    with pytest.raises(ModelError, match=f"the chat template of {endless} takes more than"):
        run(endless, path, tmp_path)


def test_an_answer_ends_where_the_context_does_if_the_benchmark_says_so(model: Path, tmp_path: Path) -> None:
    # The model holds 64 tokens; without the setting this is refused (test_lm).
    problems = [{"prompt": "1" * length, "answer": "2"} for length in (3, 30, 60)]
    path = write_benchmark(tmp_path, "long", problems, max_new_tokens=200)
    path.write_text(path.read_text().replace("  do_sample: false", "  do_sample: false\n  cut_to_context: true"))
    report = run(model, path, tmp_path, batch_size=1)
    assert report.n == 3
    assert report.rates["truncated"] > 0
