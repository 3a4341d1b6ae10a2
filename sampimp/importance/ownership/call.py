"""A call of a torch function on data, as the block made it.

Map: `Call`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sampimp.importance.ownership.row_notes import as_sequence


@dataclass(frozen=True, eq=False)
class Call:
    """A function, and the arguments of one call of it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments, also those in lists."""
        return _tensors((*self.args, *self.kwargs.values()))

    def split(self, places: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors among the arguments at some places, and all others."""
        chosen = [value for place, value in enumerate(self.args) if place in places]
        others = [value for place, value in enumerate(self.args) if place not in places]
        return _tensors(chosen), _tensors((*others, *self.kwargs.values()))

    def by_place(self) -> "Call":
        """Return the call with its first argument by its place."""
        args = self.args or (self.kwargs.get("input", self.kwargs.get("tensors")),)
        first = ("input", "tensors")
        kwargs = {name: value for name, value in self.kwargs.items() if name not in first}
        return Call(self.function, args, kwargs)

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument that is given by its place or by its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    items = (item for value in values for item in as_sequence(value))
    return [item for item in items if isinstance(item, Tensor)]
