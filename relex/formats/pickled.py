"""What a pickle holds, read without executing it: plain containers, and a record of everything it would have made.

The pickle module is not involved: its opcodes run on a small machine here, which knows those that torch.save and DCP
write and calls nothing but the builders it is given. Time and memory are bounded by the length of the content, and so
are those of whoever walks through the result: it is not nested deeply, and what it repeats by reference stays few.

torch.load(weights_only=True) is no substitute: it refuses DCP's `.metadata` and the ShardedTensor of FSDP1, makes the
objects of the others (a DTensor with its device mesh), and does not say where in the file the bytes of a tensor lie,
which is what a range of a remote file is read by. Seen with torch 2.13.
"""

import pickletools
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from relex.errors import CheckpointIncompleteError, CheckpointMismatchError

MOST_BYTES = 1 << 26
_MOST_OPCODES = 1 << 23
# What is short is cheap to look at as often as a hostile pickle repeats it.
_MOST_ARGUMENTS = 64
_MOST_CHARACTERS = 4096
# Hashing, comparing and printing recurse in C: a level more than this is no checkpoint's, a million kill the process.
_MOST_DEPTH = 100
# Each thing counted as often as it is referred to: sixty pairs of the pair before have 2^60 leaves.
_MOST_REFERENCES = 1 << 26

# Every global that these writers name; a builder's own names are known besides. Add a writer's here.
KNOWN = frozenset(
    {
        # torch.save of tensors and parameters
        "torch._tensor._rebuild_from_type_v2",
        "torch.Tensor",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_wrapper_subclass",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.storage.UntypedStorage",
        *(f"torch.{kind}Storage" for kind in ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half")),
        *(f"torch.{kind}Storage" for kind in ("Int", "Long", "Short")),
        *(f"torch.{kind}" for kind in ("bfloat16", "bool", "float16", "float32", "float64")),
        *(f"torch.{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
        *(f"torch.float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")),
        # FSDP2, and FSDP1 over a device mesh
        "torch.distributed._mesh_layout._FlatLayout",
        "torch.distributed._mesh_layout._MeshLayout",
        "torch.distributed.device_mesh.DeviceMesh",
        *(
            f"torch.distributed.{package}{module}.{kind}"
            for package in ("_tensor", "tensor")
            for module, kinds in {
                "": ("DTensor",),
                ".api": ("DTensor",),
                "._dtensor_spec": ("DTensorSpec", "ShardOrderEntry", "TensorMeta"),
                ".placement_types": ("DTensorSpec", "Partial", "Replicate", "Shard", "TensorMeta", "_StridedShard"),
            }.items()
            for kind in kinds
        ),
        # FSDP1 without a mesh: getattr is how protocol 2 names a class inside a class
        "__builtin__.getattr",
        "torch.distributed._shard.metadata.ShardMetadata",
        "torch.distributed._shard.sharded_tensor.api.ShardedTensor",
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        "torch.distributed._shard.sharded_tensor.metadata.ShardedTensorMetadata",
        "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
        "torch.distributed._shard.sharded_tensor.shard.Shard",
        "torch.distributed._shard.sharding_spec.api.EnumerableShardingSpec",
        "torch.distributed._shard.sharding_spec.chunk_sharding_spec.ChunkShardingSpec",
        "torch.distributed.remote_device._remote_device",
        # DCP's .metadata
        *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "WindowsPath")),
        *(f"pathlib._local.{kind}" for kind in ("Path", "PosixPath", "WindowsPath")),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
        "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
        "torch.distributed.checkpoint.metadata.Metadata",
        "torch.distributed.checkpoint.metadata.MetadataIndex",
        "torch.distributed.checkpoint.metadata.StorageMeta",
        "torch.distributed.checkpoint.metadata.TensorProperties",
        "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    }
)

# Opcodes whose argument is the value, and opcodes that stand for one.
_VALUES = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_VALUES |= {"BINBYTES", "SHORT_BINBYTES"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Global:
    """A class, function or constant that a pickle names, "torch.float32"."""

    name: str


@dataclass(eq=False, slots=True)
class Made:
    """What would have come out of calling `function` on `arguments`; equal only to itself, so it may be a key.

    `state` is what its `__setstate__` or `__dict__` would have got, `contents` what was appended (or set, in pairs).
    """

    function: Global
    arguments: tuple[Any, ...]
    state: Any = None
    contents: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the function; of an inner class it is that of the function it was got by."""
        return self.function.name

    def __repr__(self) -> str:
        # Never what is in it: a message may hold one.
        return f"a {self.name}"


_CONTAINERS = frozenset({tuple, list, dict, Made})

Builder = Callable[..., Any]


def load(
    content: bytes,
    *,
    where: str,
    builders: Mapping[str, Builder] | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
    unknown: Literal["refuse", "stub"] = "refuse",
) -> Any:
    """Return the object tree of a pickle: dicts, lists, tuples and scalars; `Global` and `Made` for all the rest.

    An OrderedDict is a dict, a torch.Size a tuple. `builders` are called with the arguments of the globals they stand
    for, `persistent_load` with a persistent id; they must be cheap and trust nothing. With unknown="stub" any global
    is taken, as inert as the known ones. Raises CheckpointMismatchError when the pickle names a global that is not
    known or holds what no writer of checkpoints writes, CheckpointIncompleteError when it is damaged; `where` is how
    both call it.
    """
    if len(content) > MOST_BYTES:
        raise CheckpointMismatchError(
            f"{where} is a pickle of {len(content)} bytes; of a checkpoint it has at most {MOST_BYTES}. Export the"
            " checkpoint as safetensors."
        )
    machine = _Machine(where, _PLAIN | dict(builders or {}), persistent_load, unknown)
    try:
        return _run(machine, content)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointIncompleteError(
            f"{where} is not a whole pickle: {shown(str(error))}. If the trainer is still writing, wait; otherwise save"
            " the checkpoint again."
        ) from error


def shown(text: str) -> str:
    """Return text from a file as an error message may hold it: short, on one line, printable."""
    return repr(text[:200])[1:-1]


def brief(value: Any) -> str:
    """Return what an error message may hold of any value from a file: its first items, to a small depth."""
    return shown(reprlib.repr(value))


def _ordered_dict(*arguments: Any) -> dict[Any, Any]:
    # The items follow as opcodes of their own; given here they could be copied again and again.
    if arguments:
        raise ValueError("an OrderedDict is made from arguments")
    return {}


def _size(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, tuple) or len(sizes) > _MOST_ARGUMENTS or any(type(size) is not int for size in sizes):
        raise ValueError("a torch.Size is not a short tuple of integers")
    return sizes


_PLAIN: dict[str, Builder] = {"collections.OrderedDict": _ordered_dict, "torch.Size": _size}


@dataclass
class _Machine:
    """The stack, the stacks below the marks, and the memo of a pickle that is being read."""

    where: str
    builders: Mapping[str, Builder]
    persistent_load: Callable[[Any], Any] | None
    unknown: Literal["refuse", "stub"]
    stack: list[Any] = field(default_factory=list)
    below: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop_mark(self) -> list[Any]:
        """Return what was pushed since the last mark."""
        items = self.stack
        self.stack = self.below.pop()
        return items

    def name(self, module: Any, name: Any) -> Global:
        """Return the record of a global that may be named."""
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _MOST_CHARACTERS:
            raise ValueError("a global has no module and name")
        full = f"{module}.{name}"
        if self.unknown == "refuse" and full not in KNOWN and full not in self.builders:
            raise CheckpointMismatchError(
                f"{self.where} names {shown(full)}, which no known writer of checkpoints does; relex executes nothing"
                " from a checkpoint. Export it as safetensors, with tools of those you trust it from."
            )
        return Global(full)

    def call(self, function: Any, arguments: Any) -> Any:
        """Return what a builder makes of the arguments, or a record of the call."""
        if not isinstance(function, Global | Made) or not isinstance(arguments, tuple):
            raise TypeError(f"a {type(function).__name__} is called with a {type(arguments).__name__}")
        if isinstance(function, Made):
            return Made(function.function, arguments)
        builder = self.builders.get(function.name)
        if builder is None:
            return Made(function, arguments)
        if len(arguments) > _MOST_ARGUMENTS:
            raise ValueError(f"{function.name} is called with {len(arguments)} arguments")
        return builder(*arguments)

    def put(self, target: Any, items: list[Any]) -> None:
        """Set keys and values, alternately, on a dict or on the record of something like it."""
        if isinstance(target, Made):
            target.contents.extend(zip(items[::2], items[1::2], strict=True))
            return
        if not isinstance(target, dict):
            raise TypeError(f"items are set on a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashes of tuples can take for ever or exhaust the C stack, those of large integers can be made equal, and
            # long strings take long to compare.
            if isinstance(key, int):
                fine = -(1 << 31) <= key < 1 << 31
            elif isinstance(key, str):
                fine = len(key) <= _MOST_CHARACTERS
            else:
                fine = key is None or isinstance(key, Global | Made)
            if not fine:
                raise CheckpointMismatchError(
                    f"{self.where} has a key of kind {type(key).__name__} that no known writer of checkpoints writes."
                    " Export it as safetensors, with tools of those you trust it from."
                )
            target[key] = value

    def append(self, target: Any, items: list[Any]) -> None:
        """Append to a list or to the record of something like it."""
        if not isinstance(target, list | Made):
            raise TypeError(f"items are appended to a {type(target).__name__}")
        (target.contents if isinstance(target, Made) else target).extend(items)


def _run(machine: _Machine, content: bytes) -> Any:
    for number, (opcode, argument, position) in enumerate(pickletools.genops(content)):
        if number > _MOST_OPCODES:
            raise CheckpointMismatchError(
                f"{machine.where} has more than {_MOST_OPCODES} opcodes, more than a checkpoint's. Export the"
                " checkpoint as safetensors."
            )
        code = opcode.name
        if code == "STOP":
            if position is not None and position + 1 != len(content):
                raise ValueError(f"it ends at byte {position + 1} of {len(content)}")
            (value,) = machine.stack
            _refuse_unbounded(value, machine.where)
            return value
        _step(machine, code, argument)
    raise ValueError("it has no end")


def _refuse_unbounded(value: Any, where: str) -> None:
    """Refuse content that is nested too deep, or too large when everything is written out where it is referred to."""
    # Levels and references below what has been seen, by its id.
    seen: dict[int, tuple[int, int]] = {}

    def extent(value: Any, level: int) -> tuple[int, int]:
        levels, references = seen.get(id(value), (0, 1))
        if id(value) not in seen and level <= _MOST_DEPTH:
            # What refers to itself is a leaf there.
            seen[id(value)] = levels, references
            for inner in _inside(value):
                below, more = extent(inner, level + 1)
                levels, references = max(levels, 1 + below), references + more
            seen[id(value)] = levels, references
        if level + levels > _MOST_DEPTH or references > _MOST_REFERENCES:
            raise CheckpointMismatchError(
                f"{where} is nested more than {_MOST_DEPTH} deep, or refers to the same things more than"
                f" {_MOST_REFERENCES} times, as no known writer of checkpoints does. Export it as safetensors, with"
                " tools of those you trust it from."
            )
        return levels, references

    extent(value, 0)


def _inside(value: Any) -> Iterator[Any]:
    """Yield the containers directly in a value."""
    inside: Iterable[Any] = ()
    if type(value) is Made:
        inside = (value.arguments, value.state, value.contents)
    elif type(value) is dict:
        inside = (*value.keys(), *value.values())
    elif type(value) is tuple or type(value) is list:
        inside = value
    return (inner for inner in inside if type(inner) in _CONTAINERS)


def _step(machine: _Machine, code: str, argument: Any) -> None:
    stack = machine.stack
    if code in _VALUES:
        stack.append(argument)
    elif code in {"BINPUT", "LONG_BINPUT"}:
        machine.memo[argument] = stack[-1]
    elif code in {"BINGET", "LONG_BINGET"}:
        stack.append(machine.memo[argument])
    elif code == "MEMOIZE":
        machine.memo[len(machine.memo)] = stack[-1]
    elif code == "MARK":
        machine.below.append(stack)
        machine.stack = []
    elif code == "TUPLE":
        items = machine.pop_mark()
        machine.stack.append(tuple(items))
    elif code in _TUPLES:
        count = _TUPLES[code]
        if len(stack) < count:
            raise IndexError("a tuple has too few items")
        stack[-count:] = [tuple(stack[-count:])]
    elif code in _CONSTANTS:
        stack.append(_CONSTANTS[code])
    elif code == "EMPTY_DICT":
        stack.append({})
    elif code == "EMPTY_LIST":
        stack.append([])
    elif code in {"REDUCE", "NEWOBJ"}:
        arguments = stack.pop()
        stack.append(machine.call(stack.pop(), arguments))
    elif code == "BUILD":
        state = stack.pop()
        # A dict or a tensor may carry attributes; nobody reads them.
        if isinstance(stack[-1], Made):
            stack[-1].state = state
    elif code == "SETITEM":
        value, key = stack.pop(), stack.pop()
        machine.put(stack[-1], [key, value])
    elif code == "SETITEMS":
        items = machine.pop_mark()
        machine.put(machine.stack[-1], items)
    elif code == "APPEND":
        last = stack.pop()
        machine.append(stack[-1], [last])
    elif code == "APPENDS":
        items = machine.pop_mark()
        machine.append(machine.stack[-1], items)
    elif code == "GLOBAL":
        module, _, name = argument.partition(" ")
        stack.append(machine.name(module, name))
    elif code == "STACK_GLOBAL":
        name = stack.pop()
        stack.append(machine.name(stack.pop(), name))
    elif code == "BINPERSID":
        if machine.persistent_load is None:
            raise ValueError("it refers to something outside of it")
        stack.append(machine.persistent_load(stack.pop()))
    elif code not in {"PROTO", "FRAME"}:
        raise CheckpointMismatchError(
            f"{machine.where} has the opcode {code}, which no known writer of checkpoints uses. Export it as"
            " safetensors, with tools of those you trust it from."
        )
