"""A zip archive of records that are not compressed, in a file or in a range of one: where the bytes of each lie.

Only the directory of the archive and the header of each record are read; the archive must be whole.
"""

import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from relex.files.directory import Directory

# One read brings what lies around it: the end of the archive, or the next records.
_BLOCK_BYTES = 1 << 16
_MOST_BYTES = 1 << 26
_HEADER_BYTES = 30
_HEADER_MAGIC = b"PK\x03\x04"
_END_BYTES = 22
_END_MAGIC = b"PK\x05\x06"
# What may stand behind the bytes of a record: its sizes and checksum once more.
_DESCRIPTOR_BYTES = 24
# That, and names in UTF-8: other flags are other formats.
_PLAIN_FLAGS = 0x0808


@dataclass(frozen=True)
class Record:
    """One record: bytes `start` to `start + size` of the file."""

    start: int
    size: int
    checksum: int


@dataclass(frozen=True)
class Archive:
    """An archive that is whole, and its records by name in the order of their bytes."""

    records: Mapping[str, Record]
    _window: "_Window"

    def content(self, name: str) -> bytes:
        """Return the bytes of a record; raises ValueError when its checksum is another one."""
        record = self.records[name]
        content = self._window.at(record.start - self._window.start, record.size)
        if zlib.crc32(content) != record.checksum:
            raise ValueError(f"the checksum of its record {name} is another one")
        return content


def open_archive(directory: Directory, name: str, *, start: int, stop: int) -> Archive:
    """Open the archive in bytes `start` to `stop` of a file; raises ValueError unless it is whole and plain."""
    window = _Window(directory, name, start, stop)
    end = window.at(max(0, window.size - _END_BYTES), min(_END_BYTES, window.size))
    # The library looks for an end further in front too.
    if not end.startswith(_END_MAGIC) or not end.endswith(b"\0\0"):
        raise ValueError("it does not end as a zip archive does")
    try:
        with zipfile.ZipFile(window) as library:
            members = sorted(library.infolist(), key=lambda info: info.header_offset)
            ends = [*(info.header_offset for info in members[1:]), library.start_dir]
    except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
        raise ValueError(str(error)) from error
    if not members or members[0].header_offset != 0:
        raise ValueError("its first record is not at its start")
    records: dict[str, Record] = {}
    for info, after in zip(members, ends, strict=True):
        if info.filename in records:
            raise ValueError(f"it has two records {info.filename}")
        records[info.filename] = _record(window, info, after)
    return Archive(records, window)


@dataclass
class _Window:
    """Bytes `start` to `stop` of a file, as a file; the two blocks that were read last are kept with their places."""

    directory: Directory
    name: str
    start: int
    stop: int
    position: int = 0
    blocks: tuple[tuple[int, bytes], ...] = ()

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self.stop - self.start

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to a byte, counted from the start (0), from here (1) or from the end (2)."""
        origin = (0, self.position, self.size)[whence]
        if origin + offset < 0:
            raise OSError("a place before its start")
        self.position = origin + offset
        return self.position

    def tell(self) -> int:
        """Return where the next read begins."""
        return self.position

    def read(self, count: int = -1, /) -> bytes:
        """Return `count` bytes (-1: the rest), fewer at the end."""
        left = max(0, self.size - self.position)
        content = self.at(self.position, left if count < 0 else min(count, left))
        self.position += len(content)
        return content

    def at(self, position: int, count: int) -> bytes:
        """Return `count` bytes from `position` on; raises ValueError when the file ends before."""
        if count > _MOST_BYTES:
            raise ValueError(f"{count} bytes at byte {position} are said to be its directory or a pickle")
        for first, block in self.blocks:
            if first <= position and position + count <= first + len(block):
                return block[position - first : position - first + count]
        stop = min(self.size, position + max(count, _BLOCK_BYTES))
        # What is wanted at the end is followed by what lies in front of it.
        first = min(position, max(0, stop - _BLOCK_BYTES))
        block = self.directory.read(self.name, self.start + first, self.start + stop)
        # Of a large archive one has the first records and one the directory and the last.
        self.blocks = (*self.blocks[-1:], (first, block))
        content = block[position - first : position - first + count]
        if len(content) < count:
            raise ValueError(f"it ends at byte {first + len(block)}, before byte {position + count}")
        return content


def _record(window: _Window, info: zipfile.ZipInfo, after: int) -> Record:
    """Find the bytes of a record, between its header, whose length only that says, and the next one at `after`."""
    name = info.filename.encode()
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ~_PLAIN_FLAGS:
        raise ValueError(f"its record {info.filename} is compressed or encrypted")
    header = window.at(info.header_offset, _HEADER_BYTES + len(name))
    start = info.header_offset + _HEADER_BYTES
    start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    gap = after - start - info.file_size
    if not header.startswith(_HEADER_MAGIC) or not header.endswith(name) or not 0 <= gap <= _DESCRIPTOR_BYTES:
        raise ValueError(f"its record {info.filename} of {info.file_size} bytes is not where its directory says")
    return Record(window.start + start, info.file_size, info.CRC)
