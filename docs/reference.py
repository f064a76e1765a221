"""Write what these pages take from the code: settings.md and the JSON schemas beside it, from the fields of the
pydantic models, and the table of methods.md, from METHODS.

python docs/reference.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from flows.reground.settings import RegroundSettings
from flows.settings import Settings
from relex.predictors import METHODS

SETTINGS = Path(__file__).parent / "settings.md"
METHODS_PAGE = Path(__file__).parent / "methods.md"

_HEAD = """# Settings

<!-- Written by docs/reference.py from the fields of the models: change a description there. -->

Paths are relative to the file they stand in. Unknown keys are refused, and every wrong key is named with its line;
`relex check` says what else is wrong. Where a list is asked for, one value is a list of one.

For editors, [relex.schema.json](relex.schema.json) and [reground.schema.json](reground.schema.json) are the same as
JSON schemas: `# yaml-language-server: $schema=FILE` in the first line of a config names one.
"""
_FILES: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("relex.yaml", "One training run to watch: [Run it](run.md), [Decide and stop](decide.md).", Settings),
    ("reground.yaml", "One re-grounding: [Re-ground](reground.md).", RegroundSettings),
)
_WORDS = {int: "whole number", float: "number", str: "text", Path: "path", bool: "true or false"}
_BOUNDS = ((Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below"))
_BEGIN = "<!-- methods: written by docs/reference.py from METHODS -->\n\n"
_END = "\n<!-- end of methods -->"
_HEADINGS = "| method | what it does | parameters | arXiv | backtest |\n|---|---|---|---|---|\n"
# What depends on the machine, or on another key.
_COMPUTED = {"threads": "one a core", "batch_size": "64, with vllm 1024"}


def settings() -> str:
    """Return the whole page of settings."""
    sections = (f"## {name}\n\n{about}\n\n{_tables(model)}" for name, about, model in _FILES)
    return "\n".join((_HEAD, *sections))


def schemas() -> dict[Path, str]:
    """Return the JSON schema of each file that users write, for editors, by where it lies."""
    return {SETTINGS.with_name(f"{Path(name).stem}.schema.json"): _schema(name, model) for name, _, model in _FILES}


def _schema(name: str, model: type[BaseModel]) -> str:
    content = model.model_json_schema()
    for key, value in content["properties"].items():
        # One value is a list of one, and a word is a method as well as auto: more than one branch may hold.
        value.update({"anyOf": value.pop("oneOf")} if "oneOf" in value else {})
        if key in _COMPUTED:
            value.pop("default", None)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", **content, "title": name}
    return json.dumps(head, indent=1) + "\n"


def methods() -> str:
    """Return the page of methods with the table of METHODS."""
    rows = (
        f"| `{name}` | {_cell(row.summary)} | {_code(row.written)} | {_paper(row.paper)} | {_cell(row.backtest)} |\n"
        for name, row in METHODS.items()
    )
    before, mark, rest = METHODS_PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (mark and end):
        raise ValueError(f"{METHODS_PAGE} has lost its marks {_BEGIN.strip()} and {_END.strip()}")
    return "".join((before, _BEGIN, _HEADINGS, *rows, _END, after))


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _paper(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})" if number else ""


def _tables(model: type[BaseModel]) -> str:
    # What a model shares with others comes after its own keys.
    fields = sorted(model.model_fields.items(), key=lambda field: field[0] not in model.__annotations__)
    needed = [(name, field) for name, field in fields if field.is_required()]
    given = [(name, field) for name, field in fields if not field.is_required()]
    return (
        "Keys that must be given:\n\n| key | value | meaning |\n|---|---|---|\n"
        + "".join(f"| `{name}` | {_type(field)} | {_cell(field.description)} |\n" for name, field in needed)
        + "\nKeys with a default:\n\n| key | value | default | meaning |\n|---|---|---|---|\n"
        + "".join(_rows(given))
    )


def _rows(fields: list[tuple[str, FieldInfo]], prefix: str = "") -> Iterator[str]:
    for name, field in fields:
        yield f"| `{prefix}{name}` | {_type(field)} | {_default(name, field)} | {_cell(field.description)} |\n"
        for part in _alternatives(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _rows(list(part.model_fields.items()), f"{prefix}{name}.")


def _default(name: str, field: FieldInfo) -> str:
    if name == "threads" or field.default_factory is not None:
        return _COMPUTED[name]
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return "none"
    if isinstance(value, ByteSize):
        return f"`{value.human_readable().replace('.0', '')}`"
    if isinstance(value, Path | str):
        return f"`{value}`"
    return f"`{value!r}`".replace("'", "")


def _type(field: FieldInfo) -> str:
    """Return in a reader's words what may be given for a field."""
    return _cell(_either([_words(part, field.metadata) for part in _alternatives(field.annotation)]))


def _words(annotation: Any, metadata: list[Any]) -> str:
    if annotation is ByteSize:
        return "size, such as 4GiB"
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return " or ".join(_words(part, [*metadata, *more]) for part in _alternatives(inner))
    if get_origin(annotation) is Literal:
        return _either([f"`{value}`" for value in get_args(annotation)])
    if get_origin(annotation) is dict:
        return ": ".join(_words(part, []) for part in get_args(annotation))
    if get_origin(annotation) in (list, tuple):
        return f"list of {_words(get_args(annotation)[0], []).replace('number', 'numbers', 1).replace('text', 'texts')}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "keys and values"
    bounds = [
        f"{word} {getattr(bound, name):g}"
        for kind, name, word in _BOUNDS
        for bound in _flat(metadata)
        if isinstance(bound, kind)
    ]
    return " ".join([_WORDS[annotation], *filter(None, [" and ".join(bounds)])])


def _either(words: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _flat(metadata: list[Any]) -> Iterator[Any]:
    """Yield the constraints, those inside a Field(...) among them."""
    for constraint in metadata:
        yield from constraint.metadata if isinstance(constraint, FieldInfo) else (constraint,)


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yield the parts of a union, without None and the tags that tell them apart."""
    if get_origin(annotation) is Annotated and get_origin(get_args(annotation)[0]) in (Union, UnionType):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _alternatives(part)
    elif annotation is not NoneType:
        yield annotation


def _cell(text: str | None) -> str:
    if not text:
        raise ValueError("a key has no description: give its field one")
    return text.replace("|", "\\|")


if __name__ == "__main__":
    SETTINGS.write_text(settings(), encoding="utf-8")
    METHODS_PAGE.write_text(methods(), encoding="utf-8")
    for path, text in schemas().items():
        path.write_text(text, encoding="utf-8")
