"""What a model's forward does, as far as sections are concerned: its modules' calls, its additions.

A tensor is followed from module to module by the object that it is: where one module's result is
the very object that another one is called with, nothing happens in between.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass(eq=False)
class Call:
    """One call of one module.

    Attributes:
        name: the module's qualified name.
        module: the module.
        given: its arguments, by position or name.
        results: its result, or the elements of a tuple.
        width: how many elements; None where the result is no tuple.
        start: when it began, in recorded events.
        end: when it ended.
    """

    name: str
    module: nn.Module
    given: dict[int | str, object]
    start: int
    results: tuple[object, ...] = ()
    width: int | None = None
    end: int = -1

    def encloses(self, other: Call) -> bool:
        """Whether another call was made within this one."""
        return self.start < other.start and other.end < self.end

    def first_tensor(self) -> Tensor | None:
        """The first of its arguments that is a tensor."""
        return next((value for value in self.given.values() if isinstance(value, Tensor)), None)


@dataclass(eq=False)
class Addition:
    """One addition of two tensors.

    Attributes:
        left: the first one, which an addition in place overwrites.
        right: the second one.
        result: the sum.
        in_place: whether ``left`` holds it.
        time: when it happened, in recorded events.
        within: the calls that it happened in, outermost first.
    """

    left: Tensor
    right: Tensor
    result: Tensor
    in_place: bool
    time: int
    within: tuple[Call, ...]


@dataclass
class Trace:
    """One forward.

    Attributes:
        rows: of the batch.
        shapes: of the tensors that the model returns.
        calls: by module name, in their order.
        additions: in their order.
        uses: when a function took a tensor, and the tensor.
        writes: when a function wrote into a tensor in place, but for additions.
    """

    rows: int
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    calls: dict[str, list[Call]] = field(default_factory=dict)
    additions: list[Addition] = field(default_factory=list)
    uses: list[tuple[int, Tensor]] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    _calls: list[Call] = field(default_factory=list)
    _by_result: dict[int, list[Call]] = field(default_factory=dict)

    def producer(self, tensor: object, before: int) -> Call | None:
        """The call that gave a tensor last, before a time; of nested ones the outermost."""
        return max(
            (call for call in self._by_result.get(id(tensor), ()) if call.end < before),
            key=lambda call: call.end,
            default=None,
        )

    def uses_of(self, tensor: Tensor, after: Call) -> list[int]:
        """When functions take a tensor, after a call; and when a call around that returns it."""
        return [
            *(time for time, used in self.uses if used is tensor and time > after.end),
            *(
                call.end
                for call in self._calls
                if call.encloses(after) and any(t is tensor for t in tree_leaves(call.results))
            ),
        ]

    def index(self) -> None:
        """Makes a whole trace ready to be asked."""
        self._calls = list(itertools.chain.from_iterable(self.calls.values()))
        for call in self._calls:
            for result in call.results:
                if isinstance(result, Tensor):
                    self._by_result.setdefault(id(result), []).append(call)
