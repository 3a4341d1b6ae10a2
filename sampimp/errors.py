"""The named errors of the project.

Each message has four parts in this order: what was expected, what came (with values), where (file,
run, epoch, layer or store), and what to do. Every class subclasses the builtin that a caller would
catch, and `UserError` as well: the command lines print a `UserError` as its message alone, without
a traceback, and exit with 2.

Map: `UserError` is the common root; `ConfigError`, `DataError`, `StoreError`, `ResourceError` are
raised before training starts; `UnsupportedError` by the recorder; `RecordError` by whoever reads a
record.
"""


class UserError(Exception):
    """Something a person can mend: its message is complete without a traceback."""

    def __init__(self, expected: str, got: str, where: str, todo: str) -> None:
        super().__init__(expected, got, where, todo)
        self.expected, self.got, self.where, self.todo = expected, got, where, todo

    @property
    def summary(self) -> str:
        """What was expected and what came, in one line."""
        return f"expected {self.expected}, got {self.got}"

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        """Keep all four parts on the way from a worker: an OSError keeps two of its arguments."""
        return type(self), (self.expected, self.got, self.where, self.todo)

    def __str__(self) -> str:
        return (
            f"Expected {self.expected}\n"
            f"     Got {self.got}\n"
            f"   Where {self.where}\n"
            f"   To do {self.todo}"
        )


class ConfigError(UserError, ValueError):
    """A setting is unknown, contradictory or out of range."""


class DataError(UserError, ValueError):
    """A data set is missing, truncated, unreadable or holds values that cannot be trained on."""


class StoreError(UserError, OSError):
    """The study's folder or bucket cannot be used as asked."""


class ResourceError(UserError, RuntimeError):
    """The machines do not offer what was asked for (GPUs, disk, a cluster)."""


class UnsupportedError(UserError, TypeError):
    """A layer, optimizer or step for which no exact importance is defined here."""


class RecordError(UserError, RuntimeError):
    """What is stored is not what its commit or manifest says."""
