"""The wheel: one top-level name, and recording without a cluster's stack.

The base environment of these tests is a fresh one that has the wheel, installed by pip, and links
to the distributions that the wheel requires without extras, as far as requirements lead. Nothing
is fetched, and nothing else can be imported.
"""

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from importlib.metadata import PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = (*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder)
    # Of a copy, so that the checkout gets no build/ folder.
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in tracked:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, source], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def required(wheel):
    """Names of all distributions that the wheel requires without extras."""
    (metadata,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith("-info"))
    waiting = [(Requirement(text), "") for text in PathDistribution(metadata).requires]
    known = set()
    while waiting:
        requirement, extra = waiting.pop()
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        for extra in requirement.extras or {""}:
            key = (canonicalize_name(requirement.name), extra)
            if key not in known:
                known.add(key)
                needed = distribution(requirement.name).requires or ()
                waiting += ((Requirement(text), extra) for text in needed)
    return {name for name, _ in known}


@pytest.fixture(scope="module")
def base(wheel, required, tmp_path_factory):
    """Python of the base environment."""
    folder = tmp_path_factory.mktemp("base")
    venv.create(folder, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    for name in required:
        installed = distribution(name)
        tops = {file.parts[0] for file in installed.files or () if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(installed.locate_file(top))))
    python = Path(paths["scripts"]) / "python"
    subprocess.run(
        [*PIP, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], check=True
    )
    return python


def run(python, *arguments, **options):
    """Run Python outside the checkout, with no path to it."""
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return subprocess.run(
        [python, *arguments], env=environment, capture_output=True, text=True, **options
    )


def test_the_wheel_has_one_top_level_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sampimp"}
    files = set(names)
    for folder, pattern in (("sweeps", "*.py"), ("analysis", "*.py"), ("sampimp", "*.py")):
        for file in (ROOT / folder).rglob(pattern):
            name = file.relative_to(ROOT).as_posix()
            assert (name if folder == "sampimp" else f"sampimp/{name}") in files
    assert {"sampimp/py.typed", "sampimp/sweeps/trial.py", "sampimp/analysis/kernels.py"} <= files


def test_templates_and_styles_are_in_the_wheel(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    data = [
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "analysis").rglob("*")
        if file.is_file()
        and file.suffix not in (".py", ".pyc")
        # The source of the explorer's page; `dist` has what is built from it.
        and ("application" not in file.parts or file.parent.name == "dist")
        and "node_modules" not in file.parts
    ]
    assert data
    assert {f"sampimp/{name}" for name in data} <= files


def test_the_base_requires_no_cluster_and_no_figures(required):
    assert {"torch", "xarray", "zarr", "dask", "obstore"} <= required
    assert not required & {
        *("ray", "matplotlib", "scikit-learn", "scipy", "tyro", "rich", "pooch", "pillow"),
        *("lightning", "transformers", "boto3", "distributed", "pyarrow"),
    }


def test_the_base_environment_is_complete(base):
    done = subprocess.run([*PIP, "--python", base, "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_importing_takes_less_than_a_second(base, tmp_path):
    times = []
    code = "import time; t = time.perf_counter(); import sampimp; print(time.perf_counter() - t)"
    for _ in range(3):
        done = run(base, "-c", code, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        times.append(float(done.stdout))
    assert min(times) < 1.0


def test_the_public_names_are_listed(base, tmp_path):
    code = "import json, sampimp; print(json.dumps([dir(sampimp), sampimp.__all__]))"
    listed, public = json.loads(run(base, "-c", code, cwd=tmp_path).stdout)
    assert listed == sorted(public)
    code = "import sampimp; [getattr(sampimp, name) for name in dir(sampimp) if 'Imp' not in name]"
    done = run(base, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = run(base, "-c", "import sampimp; help(sampimp)", cwd=tmp_path).stdout
    assert "ImportanceRecorder" in page
    assert "Packages, from the lowest level" in page


def test_the_loop_of_the_readme_is_recorded(base, tmp_path):
    """The loop of the README, and its result read again."""
    readme = (ROOT / "README.md").read_text()
    (loop,) = (
        block.partition("```")[0]
        for block in readme.split("```python\n")[1:]
        if "sampimp.ImportanceRecorder(" in block
    )
    setting = """
    import torch, xarray, sampimp
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.randint(0, 3, (40,))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y, torch.arange(40)), batch_size=10
    )
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    """
    check = """
    importance.to_zarr("importance.zarr", consolidated=False)
    stored = xarray.open_zarr("importance.zarr", consolidated=False)
    assert stored.importance.sizes == {"epoch": 10, "layer": 2, "sample": 40}, stored
    assert bool((stored.importance > 0).all())
    """
    code = textwrap.dedent(setting) + loop + textwrap.dedent(check)
    done = run(base, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [(["study"], "study"), (["status", "OUT"], "study"), (["report", "OUT"], "report")],
)
def test_the_command_names_the_extra_that_is_missing(base, tmp_path, arguments, extra):
    command = base.with_name("sampimp")
    done = run(command, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert f"pip install 'sampimp[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_has_help_without_extras(base, tmp_path):
    done = run(base.with_name("sampimp"), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "study" in done.stdout


def test_a_trainer_that_is_missing_is_named(base, tmp_path):
    for name, extra in (
        ("LightningImportance", "lightning"),
        ("HuggingFaceImportance", "huggingface"),
    ):
        done = run(base, "-c", f"import sampimp; sampimp.{name}()", cwd=tmp_path)
        assert f"pip install 'sampimp[{extra}]'" in done.stderr, done.stderr
