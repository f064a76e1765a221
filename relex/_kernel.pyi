from typing_extensions import Buffer

VERSION: int

def gram(
    base: int,
    stored: int,
    stored_kind: int,
    rows: int,
    stride: int,
    count: int,
    n: int,
    kind: int,
    relative: bool,
    first: int,
    sums: int,
    across: int,
    scratch: int,
    /,
) -> tuple[float, list[tuple[int, int]]]: ...
def combine(
    base: int,
    added: int,
    added_kind: int,
    rows: int,
    stride: int,
    count: int,
    n: int,
    kind: int,
    relative: bool,
    coefficients: int,
    out: int,
    out_kind: int,
    /,
) -> bool: ...
def read(buffer: Buffer, descriptors: Buffer, positions: Buffer, places: Buffer, lengths: Buffer, /) -> bool: ...
def use(cpu: str, /) -> str: ...
def scratch(count: int, /) -> int: ...
