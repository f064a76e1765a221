"""Predictions written while the Gram is taken: a tensor right after its last product, while it is in the page cache.

Nothing here decides what a prediction is. What was written lies in a hidden directory that no other call goes on with,
until the forecasts are there; what they make otherwise is written again, and whatever goes wrong is left to be told by
whoever writes it then.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from relex.contents import SecondReading
from relex.errors import RelexError
from relex.forecast import Forecast, of_tensor
from relex.output.shards import Part, output_tensors, write_unit
from relex.output.writer import ModelWriter, open_early
from relex.predictors import Method
from relex.streaming import Job, Unit, Workspace, units_of
from relex.trajectory import Trajectory


@dataclass
class _Output:
    method: Method
    target_step: int
    writer: ModelWriter
    made: dict[str, Part] = field(default_factory=dict)


@dataclass
class EarlyOutputs:
    """The outputs of (method, target step, directory), all or none of them, while a trajectory is read (see `Beside`).

    To be closed: what `finished` did not hand over is then removed.
    """

    trajectory: Trajectory
    wanted: Sequence[tuple[Method, int, Path]]
    dtype: str
    shard_size: int | None
    _outputs: list[_Output] = field(default_factory=list)
    _reading: SecondReading | None = None
    _failed: bool = False
    _running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ready(self, tensor: int, products_KK: Tensor | None, contents_URD: Tensor) -> list[Job]:
        """Return the writing of one tensor, backwards: what was read last is in the page cache for certain."""
        spec = self.trajectory.tensors[tensor]
        # What is not finite is refused once the pass is over.
        if products_KK is not None and not bool(torch.isfinite(products_KK).all()):
            self._failed = True
        parts: list[Part] = []
        with self._at_work():
            if self._reading is None and not self._failed:
                self._reading = SecondReading(self.trajectory, contents_URD)
                self._failed = not self._open()
            for output in self._outputs if not self._failed else ():
                made = of_tensor(output.method, self.trajectory.steps, output.target_step, spec, products_KK)
                # What leaves the range is told by whoever writes it once more.
                output.made[spec.name] = Part(made, output.writer, "")
                output.writer.begin(spec.stored.name)
                parts.append(output.made[spec.name])
        return [partial(self._write, unit, parts) for unit in reversed(units_of(tensor, spec))] if parts else []

    def finished(self, forecasts: Sequence[Forecast], contents_URD: Tensor | None) -> Mapping[Path, ModelWriter]:
        """Hand over, by directory, the writers of these forecasts, which have what was made as they say."""
        if self._failed or self._reading is None or contents_URD is None:
            return {}
        if self._reading.digests is None or not torch.equal(self._reading.digests, contents_URD):
            return {}
        taken = {}
        for output, forecast in zip(self._outputs, forecasts, strict=True):
            writer = output.writer
            for spec in self.trajectory.tensors:
                made, part = forecast.tensors[spec.name], output.made[spec.name]
                if (made.source, made.coefficients) != (part.made.source, part.made.coefficients):
                    writer.remove(spec.stored.name)
            if writer.take_name(forecast.digest):
                taken[writer.out] = writer
        self._outputs = [output for output in self._outputs if output.writer.out not in taken]
        return taken

    def close(self) -> None:
        """Remove what nobody goes on with."""
        with self._lock:
            left, self._outputs = self._outputs, []
        # The first one made the parent.
        for output in reversed(left):
            output.writer.discard()

    def _open(self) -> bool:
        for method, target_step, directory in self.wanted:
            tensors = output_tensors(self.trajectory, self.dtype, self.shard_size)
            writer = open_early(directory, tensors)
            if writer is None:
                return False
            self._outputs.append(_Output(method, target_step, writer))
        return True

    def _write(self, unit: Unit, parts: Sequence[Part], space: Workspace) -> None:
        with self._at_work():
            if self._failed or self._reading is None:
                return
            write_unit(self._reading, space, unit, parts)
            name = self.trajectory.tensors[unit.tensor].stored.name
            for number, part in enumerate(parts):
                shard = part.writer.tensors[name].shard
                with self._lock:
                    self._left[number, shard] -= 1
                    whole = self._left[number, shard] == 0
                if whole:
                    part.writer.close(shard)

    @cached_property
    def _left(self) -> Counter[tuple[int, str]]:
        """How many units of every shard are not written yet."""
        left: Counter[tuple[int, str]] = Counter()
        for number, output in enumerate(self._outputs):
            for tensor, spec in enumerate(self.trajectory.tensors):
                left[number, output.writer.tensors[spec.stored.name].shard] += len(units_of(tensor, spec))
        return left

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """After a failure wait for those who are at work, then make room at once: it may be what failed."""
        with self._lock:
            self._running += 1
        try:
            yield
        except RelexError:
            self._failed = True
        except BaseException:
            self._failed = True
            raise
        finally:
            with self._lock:
                self._running -= 1
                last = self._failed and self._running == 0
            if last:
                self.close()
