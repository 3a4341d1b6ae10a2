"""Old import paths: each name is the one at the new path, and a warning names that path."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from sampimp._renamed import MOVED

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [(old, name, new) for old, names in MOVED.items() for name, new in names.items()],
)
def test_a_moved_name_is_found_with_a_warning(old, name, new):
    module, _, attribute = new.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{old}.{name} is now {new};"):
        value = getattr(importlib.import_module(old), name)
    assert value is getattr(importlib.import_module(module), attribute)


def test_an_unknown_name_is_an_attribute_error():
    import sampimp.optimizers

    with pytest.raises(AttributeError, match=r"'sampimp\.optimizers' has no attribute 'nothing'"):
        sampimp.optimizers.nothing  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module("sampimp.nothing")


def test_the_folders_of_a_checkout_are_the_packages():
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import analysis.kernels
    import sweeps.trial
import sampimp.analysis.kernels, sampimp.sweeps.trial
assert analysis.kernels is sampimp.analysis.kernels
from analysis import kernels
assert kernels is sampimp.analysis.kernels
assert sweeps.trial.Trial is sampimp.sweeps.trial.Trial
print(*(str(w.message).partition(";")[0] for w in caught if "is now" in str(w.message)), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "analysis.kernels is now sampimp.analysis.kernels",
        "sweeps.trial is now sampimp.sweeps.trial",
    ], done.stderr
