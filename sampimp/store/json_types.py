"""JSON of a store: parsed within limits, and compared with the type that its readers rely on.

A study's folder may be somebody else's. So the size of a JSON file is limited before its bytes are
read, its depth and its texts when it is parsed, and its values are compared with a type
(`sampimp.store.file_types` declares one for each kind of file) before any of them is used. A wrong
value is a `RecordError` that names the file, the place in it, what was expected and what came.

Types are written as Python's own type hints: dataclasses (all entries but those of LATER_ENTRIES,
which earlier versions did not write, and no others), typed dictionaries (others are ignored),
`dict[str, T]`, `list[T]`, tuples, unions, `Literal`, `int` (from 0, below 2^63), `float` (any
number), `str`, `bool`, None and `Any`; `Annotated[int, range(...)]` and `Annotated[float, (LEAST,
LARGEST)]` limit a number and `Annotated[str, re.compile(...)]` a text.

Map: `parse_json`, `require_type`; `LARGEST_JSON`, `DEEPEST_JSON`.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from sampimp.errors import RecordError

LARGEST_JSON = 2**26
"""Largest JSON file that is read, in bytes: 64 MiB hold the digests of 4 TB of data; the commit of
50 epochs of ImageNet has 1 MB."""

DEEPEST_JSON = 32
"""Largest depth of lists and objects in it; the files of a study need 8."""


class _Wrong(NamedTuple):
    """A value of another type than expected."""

    place: str
    expected: str
    got: str


_Check = Callable[[Any], _Wrong | None]


def parse_json(content: bytes, where: str) -> Any:
    """Return the value of a JSON file.

    Raises
    ------
    RecordError
        The content is no JSON, is too deep, or has texts that are not Unicode.
    """
    try:
        value = json.loads(content)
        if _depth(value) > DEEPEST_JSON:
            raise RecursionError
        if re.search(rb"\\u[dD][89a-fA-F]", content):  # half of a character that has two
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        got = f"lists and objects nested deeper than {DEEPEST_JSON}"
    except ValueError as error:
        got = f"{len(content)} bytes: {error}"
    else:
        return value
    raise RecordError(
        expected="a JSON file",
        got=got,
        where=where,
        todo="delete this file if you know what damaged it, then run the command again",
    )


def require_type(value: Any, hint: Any, where: str) -> None:
    """Raise RecordError unless a value of JSON has a type.

    Examples
    --------
    >>> require_type({"seed": [1, 2]}, dict[str, list[int]], "study.json")
    >>> require_type({"seed": [1, None]}, dict[str, list[int]], "study.json")
    Traceback (most recent call last):
    sampimp.errors.RecordError: Expected a whole number from 0 at .seed[1]
         Got null
       Where study.json
       To do restore this file from a copy, or delete it and run the command that wrote it again
    """
    wrong = _checker(hint)(value)
    if wrong is not None:
        raise RecordError(
            expected=f"{wrong.expected} at {wrong.place or 'the top'}",
            got=wrong.got,
            where=where,
            todo="restore this file from a copy, or delete it and run the command that wrote it "
            "again",
        )


def _depth(value: Any) -> int:
    """Return how deep lists and objects are nested, up to one more than is allowed."""
    depth, level = -1, [[value]]
    while level and depth <= DEEPEST_JSON:
        inner = itertools.chain.from_iterable(
            outer.values() if type(outer) is dict else outer for outer in level
        )
        level = [item for item in inner if type(item) in (dict, list)]
        depth += 1
    return depth


_WORDS: Mapping[Any, str] = {
    int: "a whole number from 0",
    float: "a number",
    str: "a text",
    bool: "true or false",
    NoneType: "null",
}


def _words_of(value: Any) -> str:
    """Return a value of JSON in a few words; a text of a store is shortened."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return f"the text {value[:40]!r}" + ("..." if value[40:] else "")
    if isinstance(value, int):
        return str(value) if value.bit_length() < 64 else f"a number of {value.bit_length()} bits"
    return repr(value) if isinstance(value, float) else f"an {_kind(value)}"


def _kind(value: Any) -> str:
    return "object" if isinstance(value, dict) else "array"


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and value.bit_length() < 64)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


_HOLDS: Mapping[Any, Callable[[Any], bool]] = {
    int: _is_count,
    float: _is_number,
    str: lambda value: type(value) is str,
    bool: lambda value: type(value) is bool,
    NoneType: lambda value: value is None,
}


@functools.cache
def _checker(hint: Any) -> _Check:
    """Return the function that compares a value with a type."""
    if hint is Any:
        return lambda value: None
    if hint in _HOLDS:
        return _leaf(_WORDS[hint], _HOLDS[hint])
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        hints = {field.name: hints[field.name] for field in dataclasses.fields(hint)}
        return _entries(hints, getattr(hint, "LATER_ENTRIES", frozenset()), closed=True)
    if is_typeddict(hint):
        hints = get_type_hints(hint, include_extras=True)
        return _entries(hints, hint.__optional_keys__, closed=False)
    return _composed(get_origin(hint), get_args(hint))


def _composed(origin: Any, arguments: tuple[Any, ...]) -> _Check:
    if origin is NotRequired:
        return _checker(arguments[0])
    if origin is Annotated:
        return _limited(*arguments)
    if origin is Literal:
        words = f"one of {', '.join(map(str, arguments))}"
        return _leaf(words, lambda value: type(value) is str and value in arguments)
    if origin in (Union, UnionType):
        return _either([_checker(argument) for argument in arguments])
    if origin is tuple and arguments[-1] is not Ellipsis:
        return _row([_checker(argument) for argument in arguments])
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(_checker(arguments[0]), _checker(arguments[1]))
    assert isinstance(origin, type)
    assert issubclass(origin, Sequence)
    return _rows(_checker(arguments[0]))


def _leaf(words: str, holds: Callable[[Any], bool]) -> _Check:
    return lambda value: None if holds(value) else _Wrong("", words, _words_of(value))


def _limited(kind: Any, limit: Any) -> _Check:
    """Return the check of a number within limits, or of a text that matches a pattern."""
    if kind is float:
        least, largest = limit
        words = f"a number between {least:g} and {largest:g}"
        return _leaf(words, lambda value: _is_number(value) and least <= value <= largest)
    if isinstance(limit, range):
        words = f"a whole number from {limit.start} to {limit.stop - 1}"
        return _leaf(words, lambda value: _is_count(value) and value in limit)
    assert kind is str
    assert isinstance(limit, re.Pattern)
    words = f"a text that matches {limit.pattern}"
    return _leaf(words, lambda value: type(value) is str and limit.fullmatch(value) is not None)


def _either(checks: Sequence[_Check]) -> _Check:
    def check(value: Any) -> _Wrong | None:
        wrongs = []
        for alternative in checks:
            wrong = alternative(value)
            if wrong is None:
                return None
            wrongs.append(wrong)
        deepest = max(wrongs, key=lambda wrong: len(wrong.place))
        if deepest.place:
            return deepest
        return _Wrong("", " or ".join(wrong.expected for wrong in wrongs), deepest.got)

    return check


_ARRAYS = (list, tuple)
"""Of a value that was not in a file yet, such as the plan that a worker gets, the second."""


def _row(checks: Sequence[_Check]) -> _Check:
    """Return the check of a list with one entry of each type."""

    def check(value: Any) -> _Wrong | None:
        if type(value) not in _ARRAYS or len(value) != len(checks):
            return _Wrong("", f"an array of {len(checks)}", _words_of(value))
        for number, (item, part) in enumerate(zip(value, checks, strict=True)):
            if (wrong := part(item)) is not None:
                return wrong._replace(place=f"[{number}]{wrong.place}")
        return None

    return check


def _rows(part: _Check) -> _Check:
    """Return the check of a list of any length."""

    def check(value: Any) -> _Wrong | None:
        if type(value) not in _ARRAYS:
            return _Wrong("", "an array", _words_of(value))
        for number, item in enumerate(value):
            if (wrong := part(item)) is not None:
                return wrong._replace(place=f"[{number}]{wrong.place}")
        return None

    return check


def _mapping(name: _Check, part: _Check) -> _Check:
    """Return the check of an object with names and values of one type each."""

    def check(value: Any) -> _Wrong | None:
        if type(value) is not dict:
            return _Wrong("", "an object", _words_of(value))
        for key, item in value.items():
            if (wrong := name(key)) is not None:
                return wrong._replace(expected=f"as a name {wrong.expected}")
            if (wrong := part(item)) is not None:
                return wrong._replace(place=f".{key[:40]}{wrong.place}")
        return None

    return check


def _entries(hints: Mapping[str, Any], optional: frozenset[str] | set[str], closed: bool) -> _Check:
    """Return the check of an object with named entries."""
    parts = {name: _checker(hint) for name, hint in hints.items()}

    def check(value: Any) -> _Wrong | None:
        if type(value) is not dict:
            return _Wrong("", "an object", _words_of(value))
        for name, part in parts.items():
            if name not in value:
                if name not in optional:
                    return _Wrong("", f"an entry {name!r}", f"none among {len(value)}")
            elif (wrong := part(value[name])) is not None:
                return wrong._replace(place=f".{name}{wrong.place}")
        unknown = [name for name in value if name not in parts] if closed else []
        if unknown:
            return _Wrong("", f"the entries {', '.join(parts)}", f"also {unknown[0][:40]!r}")
        return None

    return check
