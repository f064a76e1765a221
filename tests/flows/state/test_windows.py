"""The name of a window: what was decided under it stays decided."""

import json
from hashlib import sha256

from flows.settings import Settings
from flows.state.windows import key_of
from relex.store import open_base
from tests.helpers.straight_run import WriteCheckpoint

DECIDING = (
    *("training_run", "window", "targets", "total_steps", "methods", "attempts", "margin", "confidence"),
    *("selection", "gate", "report", "registered_model", "dtype", "batch_size", "backend"),
)


def test_guards_name_another_window_and_without_them_it_is_called_as_it_was(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    write_checkpoint(0)
    base, seen = open_base(settings.base), {10: "a", 20: "b"}
    content = {name: getattr(settings, name) for name in DECIDING}
    content |= {"base": base.identity, "checkpoints": [[10, "a"], [20, "b"]]}
    key = key_of(settings, base, seen)
    assert key == sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    guarded = [settings.model_copy(update={"guards": {"more.yaml": margin}}) for margin in (1.0, 2.0)]
    assert len({key, *(key_of(each, base, seen) for each in guarded)}) == 3
