"""A call of a torch function on data, as the block made it.

Map: `Call`; `tensors_among`, `argument` (of arguments that are not in a `Call`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """A function, and the arguments of one call of it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments, also those in lists."""
        return list(tensors_among(self.args, self.kwargs))

    def split(self, places: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors among the arguments at some places, and all others."""
        chosen = tuple(value for place, value in enumerate(self.args) if place in places)
        others = tuple(value for place, value in enumerate(self.args) if place not in places)
        return list(tensors_among(chosen, {})), list(tensors_among(others, self.kwargs))

    def by_place(self) -> "Call":
        """Return the call with its first argument by its place."""
        args = self.args or (self.kwargs.get("input", self.kwargs.get("tensors")),)
        first = ("input", "tensors")
        kwargs = {name: value for name, value in self.kwargs.items() if name not in first}
        return Call(self.function, args, kwargs)

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument that is given by its place or by its name."""
        return argument(self.args, self.kwargs, place, name, default)


def tensors_among(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments, and those in lists and tuples among them."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            for item in value:
                if isinstance(item, Tensor):
                    yield item


def argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str, default: Any
) -> Any:
    """Return an argument that is passed by position or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)
