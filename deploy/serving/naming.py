"""The name in an answer: that of the registered model, whatever an engine calls the directory it answers from."""

import json


def named(content: bytes, name: str) -> bytes:
    """Return a JSON answer whose model is called `name`; what names no other model, or is no such answer, as it is."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(answer, dict):
        return content
    # Events of /v1/responses have the answer in them.
    others = [
        part
        for part in (answer, answer.get("response"))
        if isinstance(part, dict) and isinstance(part.get("model"), str) and part["model"] != name
    ]
    if not others:
        return content
    for part in others:
        part["model"] = name
    return json.dumps(answer, ensure_ascii=False).encode()


class NamedEvents:
    """A stream of events (text/event-stream) on its way, each with the name of the model; whole lines are let out."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """Return what can be passed on after these bytes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return b"".join(self._line(line) + b"\n" for line in lines)

    def end(self) -> bytes:
        """Return what was left of a last line without an end."""
        return self._line(self._rest)

    def _line(self, line: bytes) -> bytes:
        field, colon, value = line.partition(b":")
        if field != b"data" or not colon:
            return line
        data = value.strip()
        told = named(data, self._name)
        # Bytes that need no other name are passed on as they came.
        return line if told == data else b"data: " + told + (b"\r" if line.endswith(b"\r") else b"")
