"""The named errors of the project.

Each message has four parts in this order: what was expected, what was found instead (with values),
where (file, run, epoch, layer or store), and what to do. Every class subclasses `UserError` and the
built-in exception that a caller would catch. The command lines print the message of a `UserError`
without a traceback, and exit with status 2.

`DamageWarning` is no error: it names damage that does not stop a reader, such as a commit that
cannot be read.

Map: `UserError` is the base class. `ConfigError`, `DataError`, `StoreError`, `ResourceError` and
`MissingPackageError` are raised before training starts, `UnsupportedError` by the recorder, and
`RecordError` by the functions that read a record. `redacted` and `keep_secret`: no message repeats
a credential, whatever a server answered; `printable` prepares a text of a store or of a server for
a terminal; `require_package` imports an optional dependency.
"""

import os
import sys
from importlib import import_module
from urllib.parse import quote

_SECRET_VARIABLES = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"),
    *("AWS_CONTAINER_AUTHORIZATION_TOKEN", "RAY_AUTH_TOKEN"),
)
_SHORTEST_SECRET = 8
"""Shorter ones are made up, and may be words."""
_secrets: set[str] = set()


def keep_secret(*values: str | None) -> None:
    """Note credentials of this process, so that no message repeats them."""
    _secrets.update(value for value in values if value)


def redacted(text: str) -> str:
    """Return a text without the credentials that this process knows, as they are or in a URL.

    Examples
    --------
    >>> keep_secret("key+of+the+example")
    >>> redacted("refused: key+of+the+example, key%2Bof%2Bthe%2Bexample")
    'refused: (a credential), (a credential)'
    """
    known = _secrets | {os.environ.get(name, "") for name in _SECRET_VARIABLES}
    for secret in sorted(known, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            for form in (secret, quote(secret, safe="")):
                text = text.replace(form, "(a credential)")
    return text


class UserError(Exception):
    """An error that the user can correct; its message is complete without a traceback."""

    def __init__(self, expected: str, got: str, where: str, todo: str) -> None:
        parts = tuple(map(redacted, (expected, got, where, todo)))
        super().__init__(*parts)
        self.expected, self.got, self.where, self.todo = parts

    @property
    def summary(self) -> str:
        """The expected value and the actual one, in one line."""
        return f"expected {self.expected}, got {self.got}"

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        """Pickle all four parts: an OSError would keep two of its arguments."""
        return type(self), (self.expected, self.got, self.where, self.todo)

    def __str__(self) -> str:
        return printable(
            f"Expected {self.expected}\n"
            f"     Got {self.got}\n"
            f"   Where {self.where}\n"
            f"   To do {self.todo}"
        )


class ConfigError(UserError, ValueError):
    """A setting is unknown, contradictory or out of range."""


class DataError(UserError, ValueError):
    """A data set is missing, truncated or unreadable, or has values unfit for training."""


class StoreError(UserError, OSError):
    """The study's folder or bucket cannot be read, written or created as requested."""


class ResourceError(UserError, RuntimeError):
    """The machines lack a resource that the study needs (GPUs, disk, a cluster)."""


class DamageWarning(UserWarning):
    """A file of a study is damaged, and is read as if it did not exist."""


class MissingPackageError(UserError, ImportError):
    """An optional dependency is not installed."""


class UnsupportedError(UserError, TypeError):
    """No exact importance is implemented for a layer, an optimizer or a training step."""


class RecordError(UserError, RuntimeError):
    """Stored values differ from their commit or manifest."""


class MissingDataError(RecordError):
    """The cube lacks the runs or the variables that a result needs."""


def printable(text: str) -> str:
    r"""Return a text with its control characters escaped, line ends excepted.

    A text in somebody else's store could otherwise move the cursor or the title of a terminal.

    Examples
    --------
    >>> print(printable("red: \x1b[31m\N{RIGHT-TO-LEFT OVERRIDE}"))
    red: \x1b[31m\u202e
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def require_package(module: str, extra: str) -> None:
    """Import a module of an optional dependency, or say how to install it.

    Call it in front of the import statement, inside the function that needs the module::

        require_package("sklearn.datasets", "study")
        from sklearn.datasets import load_digits

    Parameters
    ----------
    module
        Dotted name of the module.
    extra
        The extra of this distribution that installs the module.

    Raises
    ------
    MissingPackageError
        The package is not installed. An installed package that fails to import one of its own
        dependencies raises its own error.
    """
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingPackageError(
            expected=f"the Python package {module.partition('.')[0]}",
            got=str(error),
            where=f"the environment of {sys.executable}",
            todo=f"pip install 'sampimp[{extra}]'",
        ) from None
