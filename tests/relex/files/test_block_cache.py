import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from relex.files import block_cache
from relex.files.block_cache import BlockCache

# Small blocks show every border.
BLOCK = 64
SIZES = [BLOCK * 60, BLOCK * 47 + 13, BLOCK * 60, BLOCK * 59 + 1, 5, BLOCK * 60]


class Network:
    """Files, and what was asked of them."""

    def __init__(self) -> None:
        self.files = {name: os.urandom(size) for name, size in enumerate(SIZES)}
        self.asked: list[tuple[int, int, int]] = []
        self.broken = False

    def of(self, name: int) -> Callable[[int, int], bytes]:
        def fetch(start: int, stop: int) -> bytes:
            self.asked.append((name, start, stop))
            if self.broken:
                raise FileNotFoundError(name)
            return self.files[name][start:stop]

        return fetch

    def brought(self) -> int:
        return sum(min(stop, SIZES[name]) - start for name, start, stop in self.asked)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    monkeypatch.setattr(block_cache, "BLOCK", BLOCK)
    return Network()


def _read(cache: BlockCache, network: Network, name: int, start: int, length: int) -> bytes:
    buffer = bytearray(length)
    count = cache.read_into(name, start, memoryview(buffer), size=SIZES[name], fetch=network.of(name))
    return bytes(buffer[:count])


def _pass(cache: BlockCache, network: Network, *, piece: int = 17, threads: int = 4) -> None:
    """Read every file from end to end, side by side, as a pass over a trajectory does."""

    def row(start: int) -> None:
        for name, size in enumerate(SIZES):
            assert _read(cache, network, name, start, piece) == network.files[name][start : start + piece], size

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(row, range(0, max(SIZES), piece)))


@pytest.mark.parametrize("blocks", [0, 1, 3, 20, 1000])
def test_two_passes_read_the_right_bytes_whatever_the_room(network: Network, tmp_path: Path, blocks: int) -> None:
    with BlockCache(tmp_path, size=blocks * BLOCK) as cache:
        for _ in range(2):
            _pass(cache, network)


def test_what_fits_is_fetched_once_and_in_blocks(network: Network, tmp_path: Path) -> None:
    with BlockCache(tmp_path, size=1000 * BLOCK) as cache:
        for _ in range(3):
            _pass(cache, network)
    assert network.brought() == sum(SIZES)
    assert len(network.asked) == sum(-(-size // BLOCK) for size in SIZES)


def test_what_does_not_fit_leaves_what_was_fetched_first(network: Network, tmp_path: Path) -> None:
    # There is room for half of it, less what is on its way.
    total = sum(-(-size // BLOCK) for size in SIZES)
    with BlockCache(tmp_path, size=total // 2 * BLOCK) as cache:
        _pass(cache, network, threads=1)
        assert network.brought() == sum(SIZES)
        _pass(cache, network, threads=1)
    assert network.brought() < 1.6 * sum(SIZES)


def test_a_cache_smaller_than_one_row_of_blocks_fetches_little_more_than_was_asked_for(
    network: Network, tmp_path: Path
) -> None:
    with BlockCache(tmp_path, size=2 * BLOCK) as cache:
        _pass(cache, network, threads=2)
    assert network.brought() < 1.5 * sum(SIZES)


def test_blocks_of_which_the_rest_is_never_asked_for_make_room_in_the_end(network: Network, tmp_path: Path) -> None:
    with BlockCache(tmp_path, size=10 * BLOCK) as cache:
        for number in range(0, 60, 3):
            _read(cache, network, 0, number * BLOCK, 1)
        network.asked.clear()
        for start in range(0, SIZES[2], 16):
            _read(cache, network, 2, start, 16)
    # Four reads a block: one request each at first, and then one for all four.
    assert 60 < len(network.asked) < 160


def test_the_disk_holds_no_more_than_the_bound_and_nothing_with_a_name(network: Network, tmp_path: Path) -> None:
    # Tests before this one, of other libraries, may have left some.
    before = set(threading.enumerate())
    directory = tmp_path / "made"
    with BlockCache(directory, size=5 * BLOCK) as cache:
        _pass(cache, network)
        assert os.fstat(cache._descriptor).st_size <= 5 * BLOCK
        assert list(directory.iterdir()) == []
    assert set(threading.enumerate()) <= before
    assert not any(thread.name.startswith("relex-fetch") for thread in threading.enumerate())


def test_nothing_is_made_where_nothing_is_read(tmp_path: Path) -> None:
    with BlockCache(tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists()


def test_a_file_that_is_shorter_than_it_was_ends_early(network: Network, tmp_path: Path) -> None:
    network.files[0] = network.files[0][:100]
    with BlockCache(tmp_path, size=100 * BLOCK) as cache:
        assert _read(cache, network, 0, 80, 60) == network.files[0][80:100]
        assert _read(cache, network, 0, 200, 10) == b""
        # Other blocks lie behind it by now.
        _read(cache, network, 2, 0, 5 * BLOCK)
        assert _read(cache, network, 0, 80, 60) == network.files[0][80:100]


def test_what_a_fetch_raises_is_raised_and_the_next_read_asks_again(network: Network, tmp_path: Path) -> None:
    with BlockCache(tmp_path, size=100 * BLOCK) as cache:
        network.broken = True
        with pytest.raises(FileNotFoundError):
            _read(cache, network, 0, 0, 10)
        network.broken = False
        assert _read(cache, network, 0, 0, 10) == network.files[0][:10]


def test_a_full_disk_is_not_the_end(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with BlockCache(tmp_path, size=100 * BLOCK) as cache:
        monkeypatch.setattr(os, "pwrite", full)
        _pass(cache, network)
