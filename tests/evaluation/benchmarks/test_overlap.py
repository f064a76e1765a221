import json
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.benchmarks.benchmark import write_benchmark
from evaluation.benchmarks.contents import describe
from evaluation.benchmarks.overlap import overlap, refuse_overlap
from evaluation.errors import BenchmarkError, OverlapError

APPLES = "Ann has three apples and eats one of them. How many are left?"
RABBITS = "A farmer counts rabbits by their ears and finds fourteen ears. How many rabbits?"
TRAINS = "Two trains start at noon, 300 km apart, and meet at two. How fast are they together?"
CLOCKS = "A clock strikes six in five seconds. How long does it take for twelve strokes?"
SHORT = "1+1="


def write(directory: Path, name: str, prompts: list[str], *, answer: str = "7") -> Path:
    problems = [{"prompt": prompt, "answer": answer} for prompt in prompts]
    return write_benchmark(directory, name, problems, max_new_tokens=8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("overlap")


@pytest.fixture(scope="module")
def plain(directory: Path) -> Path:
    return write(directory, "plain", [APPLES, RABBITS, SHORT])


@pytest.fixture(scope="module")
def dressed(directory: Path) -> Path:
    """Return a benchmark of which two problems are also in the plain one, in a template and in another form."""
    path = write(directory, "dressed", [TRAINS, RABBITS.upper().replace(" ", "\n "), CLOCKS, "2+2="])
    text = path.read_text()
    assert "doc_to_text: prompt" in text
    path.write_text(text.replace("doc_to_text: prompt", 'doc_to_text: "Solve this with great care: {{prompt}}"'))
    return path


def test_problems_of_two_benchmarks_are_compared_by_content_in_a_child_and_kept(
    plain: Path, dressed: Path, directory: Path
) -> None:
    cache = directory / "cache"
    shared = overlap(plain, dressed, cache=cache)
    assert (shared.first, shared.first_n, shared.second, shared.second_n) == ("plain", 3, "dressed", 4)
    assert len(shared.shared) == 1
    assert shared.shared[0].startswith("solve this with great care: a farmer counts rabbits")
    assert (shared.first_repeated, shared.second_repeated, shared.warnings) == ((), (), ())
    with pytest.raises(
        OverlapError,
        match=r"1 of the 4 problems of gate dressed are among the 3 of selection plain too, such as 'solve this .*: "
        "what chooses a candidate cannot judge it, remove them from one of the two or choose another",
    ):
        refuse_overlap(plain, dressed, cache=cache)
    # A process without lm-eval, and the other way round.
    script = f"""
import sys
from pathlib import Path
from evaluation.benchmarks.overlap import overlap
print(overlap({str(dressed)!r}, {str(plain)!r}, cache=Path({str(cache)!r})).shared)
assert not {{"lm_eval", "torch", "datasets"}} & {{*sys.modules}}
"""
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("('a farmer counts rabbits")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_another_lm_eval_reads_the_prompts_again(plain: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = directory / "versions"
    overlap(plain, plain, cache=cache)
    (kept,) = (cache / "contents").glob("*.json")
    monkeypatch.setattr("evaluation.benchmarks.overlap.version", lambda _: "0.0")
    overlap(plain, plain, cache=cache)
    assert kept in (cache / "contents").glob("*.json")
    assert len([*(cache / "contents").glob("*.json")]) == 2


def test_what_the_child_refuses_is_raised(directory: Path) -> None:
    path = write(directory, "broken", [TRAINS])
    path.write_text(path.read_text().replace("test_split: test", "test_split: train"))
    with pytest.raises(BenchmarkError, match=r"lm-eval cannot load .*broken\.yaml: .*train"):
        overlap(path, path, cache=directory / "cache")


def shared(first: list[dict[str, object]], second: list[dict[str, object]], *, key: str = "question") -> list[str]:
    ours = describe("a", [each[key] for each in first], first)
    theirs = describe("b", [each[key] for each in second], second)
    known = {digest for problem in ours.problems for digest in problem.digests}
    return [problem.title for problem in theirs.problems if not known.isdisjoint(problem.digests)]


def test_space_and_case_hide_nothing_and_short_prompts_count() -> None:
    assert shared([{"question": "1 + 1 ="}], [{"question": " 1  +\n1 = "}]) == ["1 + 1 ="]
    assert shared([{"question": "Is it A?"}], [{"question": "is it a?"}]) == ["is it a?"]
    assert shared([{"question": "1 + 1 ="}], [{"question": "1 + 2 ="}]) == []


def test_a_text_of_several_different_problems_is_no_problem() -> None:
    passage = "Once upon a time there was a miller who had three sons."
    first: list[dict[str, object]] = [{"question": APPLES, "passage": passage}]
    second: list[dict[str, object]] = [
        {"question": TRAINS, "passage": passage},
        {"question": CLOCKS, "passage": passage},
    ]
    assert shared(first, second) == []
    assert shared(second, first) == []
    # One problem twice in its own benchmark is one problem, and hides from no other.
    twice: list[dict[str, object]] = [{"question": f"Q: {RABBITS}", "raw": RABBITS}] * 2
    assert len(shared(twice, [{"question": "?", "nested": [{"q": RABBITS}]}])) == 1


def test_short_texts_beside_the_prompt_say_nothing() -> None:
    first: list[dict[str, object]] = [{"question": APPLES, "answer": "two apples", "level": "Level 5"}]
    assert shared(first, [{"question": TRAINS, "answer": "two apples", "level": "Level 5"}]) == []


def test_a_task_without_a_text_prompt_is_compared_by_its_documents() -> None:
    first: list[dict[str, object]] = [{"question": 0, "a": "x"}, {"question": 1, "a": "y"}]
    assert len(shared(first, [{"question": 1, "a": "y"}, {"question": 1, "a": "z"}])) == 1


def test_long_problems_are_cut_to_a_readable_length() -> None:
    (title,) = shared([{"question": APPLES * 50}], [{"question": APPLES * 50}])
    assert len(title) == 80
    assert title.endswith("…")


def test_a_problem_twice_in_one_benchmark_is_told(directory: Path) -> None:
    # Problems may differ in what is not shown.
    cache = directory / "cache"
    twice = write_benchmark(
        directory,
        "twice",
        [{"prompt": CLOCKS, "answer": "11"}, {"prompt": TRAINS, "answer": "7"}, {"prompt": CLOCKS, "answer": "12"}],
        max_new_tokens=8,
    )
    shared = refuse_overlap(write(directory, "other", [APPLES, RABBITS]), twice, cache=cache)
    assert shared.second_repeated == (CLOCKS.casefold(),)
    assert shared.warnings == (
        f"1 of 3 problems of twice have occurred in it before, such as {CLOCKS.casefold()!r}: they count twice.",
    )
    kept = [json.loads(path.read_text()) for path in (cache / "contents").glob("twice-*.json")]
    assert [len(each["problems"]) for each in kept] == [3]


def test_a_long_answer_that_two_benchmarks_have_is_no_problem_that_they_share(tmp_path: Path) -> None:
    zero = r"\begin{pmatrix} 0 & 0 \\\\ 0 & 0 \end{pmatrix}"
    first = write(tmp_path, "first", [APPLES], answer=zero)
    second = write(tmp_path, "second", [RABBITS], answer=zero)
    assert overlap(first, second, cache=tmp_path / "cache").shared == ()
