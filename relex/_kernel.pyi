from typing_extensions import Buffer

VERSION: int

def gram(
    base: Buffer,
    stored: Buffer,
    stored_kind: int,
    rows: Buffer,
    stride: int,
    count: int,
    n: int,
    kind: int,
    relative: bool,
    first: int,
    sums: Buffer,
    across: int,
    scratch: Buffer,
    suspects: Buffer,
    /,
) -> float: ...
def combine(
    base: Buffer,
    added: Buffer,
    added_kind: int,
    rows: Buffer,
    stride: int,
    count: int,
    n: int,
    kind: int,
    relative: bool,
    coefficients: Buffer,
    out: Buffer,
    out_kind: int,
    /,
) -> bool: ...
def read(buffer: Buffer, descriptors: Buffer, positions: Buffer, places: Buffer, lengths: Buffer, /) -> bool: ...
def use(cpu: str, /) -> str: ...
def scratch(count: int, /) -> int: ...
