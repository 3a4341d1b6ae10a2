"""Imports run one way, files stay small, names are unique, heavy dependencies have one home."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "schema": (),
    "errors": (),
    "config": ("schema", "errors"),
    "importance": ("schema", "errors", "config"),
    "data": ("schema", "errors"),
    "store": ("schema", "errors", "config", "data"),
    "training": ("schema", "errors", "config", "importance", "data"),
    "influence": ("schema", "errors", "config", "importance", "data", "training"),
    "subsets": ("schema", "errors", "config", "data", "training", "influence"),
    "integrations": ("errors", "importance"),
    "analysis": ("schema", "errors", "store"),
    "sweeps": (
        *("schema", "errors", "config", "importance", "data", "store", "training"),
        *("influence", "subsets"),
    ),
}
"""Of each package or module of `sampimp`, the others that it may import, lowest level first."""

ENDS_WITH_REPORT = {("sampimp/sweeps/full_study.py", "analysis")}
"""A study ends with its report. (`sampimp report` imports it by name, once it is asked for.)"""

HOMES = {
    # Ray trains in sweeps/; where Ray holds a cluster, dask may compute there as well.
    "ray": ("sampimp/sweeps/", "sampimp/analysis/schedulers.py"),
    "distributed": ("sampimp/analysis/schedulers.py",),
    "torch": (
        "sampimp/importance/",
        "sampimp/integrations/",
        "sampimp/influence/",
        "sampimp/subsets/",
        "sampimp/training/",
        "sampimp/sweeps/",
    ),
    "zarr": ("sampimp/store/zarr_arrays.py",),
    "obstore": tuple(
        f"sampimp/store/{name}.py"
        for name in ("aws_credentials", "buckets", "location", "s3_errors")
    ),
    "boto3": ("sampimp/store/aws_credentials.py",),
    "botocore": ("sampimp/store/aws_credentials.py",),
    "dask": (
        "sampimp/analysis/",
        *(
            f"sampimp/store/{name}.py"
            for name in ("cube", "influence_cube", "lazy_arrays", "subset_cube")
        ),
    ),
    "sklearn": ("sampimp/analysis/", "sampimp/data/"),
    "scipy": ("sampimp/analysis/",),
    "matplotlib": (
        "sampimp/analysis/figures/",
        *(f"sampimp/analysis/report/{name}.py" for name in ("figure_plan", "influence_figures")),
    ),
    "PIL": (
        "sampimp/data/",
        "sampimp/analysis/explorer/sprites.py",
        "sampimp/analysis/figures/pictures.py",
    ),
    "jinja2": ("sampimp/analysis/report/",),
    "lightning": ("sampimp/integrations/lightning.py",),
    "transformers": ("sampimp/integrations/huggingface.py",),
}
"""Of each heavy dependency, the files and folders (with a slash at the end) that may import it."""

EXEMPT = {"_renamed", "_lazy"}
"""Old import paths, and imports at first use: both may import every package."""

MOST_LINES, MOST_CLASS_LINES = 450, 300
TABLES = {"sampimp/analysis/claims/table.py"}
"""Pure data, of any length."""


def python_files(*folders):
    """Return the Python files below folders; links to folders (sweeps, analysis) are followed."""
    return sorted(
        (Path(folder) / name).relative_to(ROOT).as_posix()
        for top in folders
        for folder, _, names in os.walk(ROOT / top, followlinks=True)
        for name in names
        if name.endswith(".py")
    )


def imports(source, filename="<string>"):
    """Yield (line, dotted name) for every import, those inside functions included."""
    for node in ast.walk(ast.parse(source, filename)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from sampimp.analysis import report` imports sampimp.analysis.report
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def package_of(path):
    """Return the package or module of `sampimp` that a file belongs to."""
    return path.split("/")[1].removesuffix(".py")


def violations(path, source):
    """Return a sentence for every import in a file that belongs elsewhere."""
    package = package_of(path)
    wrong = []
    for line, name in imports(source, path):
        top, _, rest = name.partition(".")
        imported = rest.partition(".")[0]
        if top in HOMES and not path.startswith(HOMES[top]):
            wrong.append(f"{path}:{line} imports {name}; only {', '.join(HOMES[top])} may")
        if top in ("sweeps", "analysis"):
            wrong.append(f"{path}:{line} imports {name}; its name is sampimp.{name}")
        if top == "sampimp" and imported in MAY_IMPORT and imported != package:
            allowed = MAY_IMPORT[package]
            if imported not in allowed and (path, imported) not in ENDS_WITH_REPORT:
                wrong.append(f"{path}:{line} imports {name}; {package} may import {allowed}")
    return wrong


def test_imports_run_one_way():
    wrong = []
    for path in python_files("sampimp"):
        if path != "sampimp/__init__.py" and package_of(path) not in EXEMPT:
            wrong += violations(path, (ROOT / path).read_text())
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_package_has_a_place():
    packages = {package_of(path) for path in python_files("sampimp")} - EXEMPT - {"__init__"}
    assert packages == set(MAY_IMPORT)


def test_levels_have_no_cycle():
    order = list(MAY_IMPORT)
    for package, below in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(package) for other in below), package


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("sampimp/training/loop.py", "import torch.nn", False),
        ("sampimp/training/loop.py", "def f():\n    from ray import tune", True),
        ("sampimp/training/loop.py", "from sampimp.store.record import TrialRecord", True),
        ("sampimp/importance/recorder.py", "from sampimp.training.models import build_model", True),
        ("sampimp/data/npz.py", "import zarr", True),
        ("sampimp/store/cube.py", "from sampimp.analysis.kernels import rank", True),
        ("sampimp/analysis/kernels.py", "from sampimp.sweeps import trial", True),
        ("sampimp/analysis/kernels.py", "from sampimp.analysis import runs", False),
        ("sampimp/analysis/kernels.py", "from analysis import runs", True),
        ("sampimp/analysis/kernels.py", "import torch", True),
        ("sampimp/analysis/kernels.py", "import ray", True),
        ("sampimp/analysis/schedulers.py", "from ray.util.dask import ray_dask_get", False),
        ("sampimp/analysis/kernels.py", "import rayleigh", False),
        ("sampimp/sweeps/trial.py", "from sampimp.analysis import report", True),
        ("sampimp/sweeps/full_study.py", "from sampimp.analysis.report import main", False),
    ],
)
def test_imports_against_the_rule_are_reported(path, source, wrong):
    assert bool(violations(path, source)) is wrong


@pytest.mark.parametrize("module", ["lightning", "huggingface"])
def test_a_trainer_is_imported_only_by_its_module(module):
    other = {"lightning": "transformers", "huggingface": "lightning"}[module]
    code = f"import sys, sampimp.integrations.{module}; print({other!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_files_and_classes_are_short():
    long = []
    for path in python_files("sampimp", "benchmarks", "examples"):
        if path in TABLES:
            continue
        source = (ROOT / path).read_text()
        if (lines := source.count("\n")) > MOST_LINES:
            long.append(f"{path}: {lines} lines, at most {MOST_LINES}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MOST_CLASS_LINES:
                    long.append(f"{path}: {node.name} {lines} lines, at most {MOST_CLASS_LINES}")
    assert not long, "\n" + "\n".join(long)


def test_names_are_unique():
    """A file, class, public function or public constant has a name that no other one has."""
    stems, names = Counter(), Counter()
    for path in python_files("sampimp"):
        stem = Path(path).stem
        if not stem.startswith("__"):
            stems[stem] += 1
        for node in ast.parse((ROOT / path).read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names[node.name] += 1
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(target.id for target in targets if isinstance(target, ast.Name))
    # A command's entry point is `main`; private names belong to their file.
    twice = {name for name, count in names.items() if count > 1 and not name.startswith("_")}
    assert twice <= {"main"}
    assert {stem for stem, count in stems.items() if count > 1} == set()


def test_no_file_is_loaded_under_two_names(tmp_path):
    """Import everything, by its name and by the folders' names, and compare the modules' files."""
    code = """
import importlib, os, pkgutil, sys, warnings
warnings.simplefilter("ignore")
import sampimp, sweeps, analysis, analysis.kernels, sweeps.trial
for module in pkgutil.walk_packages(sampimp.__path__, "sampimp."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
files = {}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    path = os.path.relpath(os.path.realpath(file or ""))
    if path.split(os.sep)[0] in ("sampimp", "sweeps", "analysis"):
        files.setdefault(path, set()).add(module.__name__)
assert len(files) > 60, len(files)
print([names for names in files.values() if len(names) > 1])
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr


def project_files():
    """Return the files that are, or would be, in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


# Where people and build machines keep their files; /proc, /dev and /usr are the same everywhere.
MACHINE_PATH = re.compile(r"(?<![\w.~:/)}$*-])/(?:home|Users|root|work|opt|mnt)/[\w.-]+")


def test_no_file_names_a_machines_folders():
    found = []
    for file in project_files():
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # an image, or a file deleted but not yet committed so
        for number, line in enumerate(lines, start=1):
            if match := MACHINE_PATH.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number} names {match[0]}")
    assert not found, "\n" + "\n".join(found)


def test_every_dependency_is_pinned_inside_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            assert "+" not in specifier.version, f"{line}: a local build that others cannot install"
            pins[canonicalize_name(pin.name)] = specifier.version
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(name for extra in extras for name in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name == project["name"]:
            continue  # an extra that includes others
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned, f"constraints.txt has no version of {requirement.name}"
        assert requirement.specifier.contains(pinned), f"{requirement} excludes the pin {pinned}"
