from pathlib import Path

import pytest
import s3fs

from relex.errors import OutputError, RelexError, UnreachableError
from relex.extrapolation import extrapolate_run
from relex.layouts.hf import INDEX_FILE, SINGLE_FILE
from relex.output import manifest
from relex.output.manifest import FILE_NAME, Manifest
from relex.output.materialise import rebuild
from relex.output.upload import CLAIM
from relex.predictors import parse_method
from tests.helpers.buckets import Buckets
from tests.helpers.proxy import Faults, proxy
from tests.helpers.trajectories import MIB, TARGET, Run, drift, tree, write_run


def _predict(run: Run, out: str, work: Path, method: str = "relex") -> Manifest:
    made = extrapolate_run(
        str(run.run), str(run.base), targets=[TARGET], out=out, method=parse_method(method), memory=64 * MIB,
        threads=2, grams=work / "grams", staging=work / "staging",
    )  # fmt: skip
    return next(iter(made.values()))


def _expect_the_same(buckets: Buckets, place: str, local: Path) -> None:
    names = sorted(path.name for path in local.iterdir())
    assert buckets.names(place) == names
    for name in set(names) - {FILE_NAME}:
        assert buckets.get(f"{place}/{name}") == (local / name).read_bytes(), name


@pytest.fixture
def out(buckets: Buckets) -> str:
    return f"s3://{buckets.make()}/predicted"


@pytest.mark.parametrize("shards", [1, 2])
def test_what_is_written_to_a_bucket_is_what_is_written_to_a_disk_and_nothing_stays_here(
    buckets: Buckets, out: str, tmp_path: Path, shards: int
) -> None:
    tmp_path.joinpath("run").mkdir()
    run = write_run(tmp_path / "run", drift(), base_shards=shards)
    here = _predict(run, str(tmp_path / "here"), tmp_path)
    there = _predict(run, out, tmp_path)
    assert (there.digest, there.files) == (here.digest, here.files)
    _expect_the_same(buckets, f"{out}/step-{TARGET}", tmp_path / "here" / f"step-{TARGET}")
    assert tree(tmp_path / "staging") == set()


@pytest.mark.parametrize("shards", [1, 2])
def test_what_a_loader_looks_for_is_sent_last(
    buckets: Buckets, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    tmp_path.joinpath("run").mkdir()
    run = write_run(tmp_path / "run", drift(), base_shards=shards)
    faults = Faults()
    with proxy(buckets.url, faults) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        _predict(run, out, tmp_path)
    sent = [path.rpartition("/")[2].partition("?")[0] for method, path in faults.requests if method in {"PUT", "POST"}]
    assert sent[0] == CLAIM
    assert sent[-2:] == [FILE_NAME, SINGLE_FILE if shards == 1 else INDEX_FILE]


def test_a_second_call_sends_nothing(
    buckets: Buckets, out: str, local: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _predict(local, out, tmp_path)
    faults = Faults()
    with proxy(buckets.url, faults) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        assert _predict(local, out, tmp_path) == first
    assert {method for method, _ in faults.requests} == {"GET"}
    assert tree(tmp_path / "staging") == set()


def test_an_upload_cut_off_anywhere_is_no_model_and_is_taken_up(
    buckets: Buckets, local: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _predict(local, str(tmp_path / "here"), tmp_path)
    left = 0

    def refuse(method: str, path: str, number: int) -> int | None:
        nonlocal left
        left -= method not in {"GET", "HEAD"}
        return 400 if left < 0 else None

    with proxy(buckets.url, Faults(refuse=refuse)) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        # The claim, every file, the manifest; then the claim is deleted.
        for done in range(len(whole.files) + 3):
            out = f"s3://{buckets.make()}/predicted"
            place = f"{out}/step-{TARGET}"
            left = done
            with pytest.raises(UnreachableError, match="does not answer"):
                _predict(local, out, tmp_path)
            present = buckets.names(place)
            if not whole.files.keys() <= set(present):
                assert not {SINGLE_FILE, INDEX_FILE} & set(present), done
            left = 1000
            assert _predict(local, out, tmp_path).digest == whole.digest
            _expect_the_same(buckets, place, tmp_path / "here" / f"step-{TARGET}")
            assert tree(tmp_path / "staging") == set()


def test_what_was_never_sent_does_not_stay_and_is_not_in_the_way(
    buckets: Buckets, out: str, local: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(out: str, method: str) -> None:
        def refuse(method: str, path: str, number: int) -> int | None:
            return 400 if method == "PUT" else None

        with monkeypatch.context() as patched, proxy(buckets.url, Faults(refuse=refuse)) as url:
            patched.setenv("AWS_ENDPOINT_URL", url)
            s3fs.S3FileSystem.clear_instance_cache()
            with pytest.raises(UnreachableError):
                _predict(local, out, tmp_path, method)
        s3fs.S3FileSystem.clear_instance_cache()

    cut_off(f"{out}/first", "relex")
    cut_off(f"{out}/second", "hold")
    assert len(list((tmp_path / "staging").iterdir())) == 1
    _predict(local, f"{out}/second", tmp_path, "relex")
    assert tree(tmp_path / "staging") == set()


def test_something_else_there_is_refused_and_left_alone(buckets: Buckets, out: str, local: Run, tmp_path: Path) -> None:
    place = f"{out}/step-{TARGET}"
    buckets.put(f"{place}/notes.txt", b"mine")
    with pytest.raises(OutputError, match=r"holds something relex did not write\. Delete it, or give another --out"):
        _predict(local, out, tmp_path)
    assert buckets.names(place) == ["notes.txt"]
    buckets.delete(f"{place}/notes.txt")
    _predict(local, out, tmp_path)
    with pytest.raises(OutputError, match=r"exists and holds the prediction .*…, not .*…"):
        _predict(local, out, tmp_path, "hold")
    buckets.delete(f"{place}/{FILE_NAME}")
    buckets.put(f"{place}/{CLAIM}", b"0123456789abcdef")
    with pytest.raises(OutputError, match="an unfinished upload of the prediction 0123456789ab…"):
        _predict(local, out, tmp_path)


def test_a_prediction_in_a_bucket_can_be_built_again(buckets: Buckets, out: str, local: Run, tmp_path: Path) -> None:
    _predict(local, out, tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in buckets.names(f"{out}/step-{TARGET}"):
        (copy / name).write_bytes(buckets.get(f"{out}/step-{TARGET}/{name}"))
    assert manifest.verify(copy).forecast.target_step == TARGET
    rebuild(copy, tmp_path / "again", memory=64 * MIB, threads=2)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("hf://org/predicted", "output hf://org/predicted cannot be: relex does not write to the Hub"),
        ("s3://no-such-bucket/predicted", "there is no such bucket"),
        ("zz://predicted", "zz:// is no kind of store"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_read(
    buckets: Buckets, tmp_path: Path, out: str, message: str
) -> None:
    with pytest.raises(RelexError, match=message):
        _predict(Run(tmp_path / "no-base", tmp_path / "no-run"), out, tmp_path)
