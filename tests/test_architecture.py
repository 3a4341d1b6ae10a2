"""Imports run one way, heavy dependencies have one home, no file names a machine's folders."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("sampimp", "sweeps", "analysis")

TRAINERS = ("lightning", "transformers")

# Who may import what: a folder (with its trailing slash) or a file.
HOMES = {
    "sweeps": [],
    "analysis": [],
    "sampimp.sweeps": ["sweeps/"],
    "sampimp.analysis": ["analysis/"],
    "sampimp.analysis.report": [
        "analysis/",
        "sweeps/full_study.py",
    ],  # the door ends with the report
    # Ray trains in sweeps/; on a cluster that Ray holds already, dask may compute there as well.
    "ray": ["sweeps/", "analysis/schedulers.py"],
    "distributed": ["analysis/schedulers.py"],
    "torch": ["sampimp/", "sweeps/"],
    "zarr": ["sampimp/store/zarr_arrays.py"],
    "obstore": [
        f"sampimp/store/{name}.py"
        for name in ("aws_credentials", "buckets", "location", "s3_errors")
    ],
    "boto3": ["sampimp/store/aws_credentials.py"],
    "botocore": ["sampimp/store/aws_credentials.py"],
    "dask": ["analysis/", "sampimp/store/cube.py"],
    "sklearn": ["analysis/", "sampimp/data/"],
    **{name: ["sampimp/integrations/"] for name in TRAINERS},
}


def imports(source, filename="<string>"):
    """Yield (line, dotted name) for every import, those inside functions included."""
    for node in ast.walk(ast.parse(source, filename)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from analysis import report` imports sampimp.analysis.report
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def home_of(name):
    """Return the most particular entry of HOMES that an imported name falls under, or None."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in HOMES), None)


def violations(path, source):
    """Return a sentence for every import in a file that belongs elsewhere."""
    found = []
    for line, name in imports(source, path):
        home = home_of(name)
        if home is not None and not any(path.startswith(allowed) for allowed in HOMES[home]):
            found.append(
                f"{path}:{line} imports {name}; {home} is imported only in {', '.join(HOMES[home])}"
            )
    return found


def test_imports_run_one_way():
    found = []
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            found += violations(file.relative_to(ROOT).as_posix(), file.read_text())
    assert not found, "\n" + "\n".join(found)


def test_trainers_are_imported_only_where_one_is_used():
    source = "\n".join(
        (ROOT / "sampimp/integrations" / f"{name}.py").read_text()
        for name in ("lightning", "huggingface")
    )
    body = ast.parse(source).body
    at_once = [
        node
        for node in body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not ast.unparse(node).startswith("if TYPE_CHECKING:")
    ]

    def trainers(source):
        return {name.partition(".")[0] for _, name in imports(source)} & set(TRAINERS)

    assert trainers(source) == set(TRAINERS)
    assert not trainers(ast.unparse(ast.Module(at_once, [])))


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("sampimp/training/loop.py", "import torch.nn", False),
        ("sampimp/training/loop.py", "def f():\n    from ray import tune", True),
        ("sampimp/store/cube.py", "import zarr", True),
        ("sampimp/store/cube.py", "from sampimp.analysis.kernels import rank", True),
        ("analysis/results/curves.py", "from sampimp.sweeps import plan", True),
        ("analysis/results/curves.py", "import torch", True),
        ("analysis/results/curves.py", "import ray", True),
        ("analysis/schedulers.py", "from ray.util.dask import ray_dask_get", False),
        ("analysis/rayleigh.py", "import rayleigh", False),
        ("sweeps/trial.py", "from sampimp.analysis import report", True),
        ("sweeps/full_study.py", "from sampimp.analysis import report", False),
        ("sweeps/full_study.py", "from sampimp.analysis.report import write_report", False),
        ("sweeps/full_study.py", "from sampimp.analysis.kernels import rank", True),
    ],
)
def test_the_rule_sees_what_it_should(path, source, wrong):
    assert bool(violations(path, source)) is wrong


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
