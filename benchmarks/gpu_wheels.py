"""Fetch wheels and MNIST for a GPU machine without a package index.

The wheels have the versions in constraints.txt, for Python 3.12 on Linux and an x86-64 processor:
the packages that `gpu.py` imports beside PyTorch, with their dependencies. MNIST's four files lie
beside them. All files and the checkout together must stay below `LIMIT`.
"""

import gzip
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import tyro
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sampimp.data.official import MNIST_FILES, read_mnist_file

ROOT = Path(__file__).parents[1]

PACKAGES = ("numpy", "rich", "tyro")
"""Imported beside PyTorch; `tests/test_gpu_script.py` runs the script with no other packages."""

LIMIT = 60 * 10**6
"""Bytes of wheels, MNIST and checkout together."""

TARGET = {"python_version": "3.12", "python_full_version": "3.12.0", "sys_platform": "linux"}
PLATFORMS = [
    *("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64"),
    *("manylinux2014_x86_64", "manylinux1_x86_64"),
]


def with_requirements(packages: tuple[str, ...]) -> list[str]:
    """Return the names of packages and all their dependencies, from the installed metadata."""
    names: dict[str, None] = {}
    waiting = list(packages)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in names:
            names[name] = None
            for line in importlib.metadata.requires(name) or []:
                requirement = Requirement(line)
                if not requirement.marker or requirement.marker.evaluate({**TARGET, "extra": ""}):
                    waiting.append(requirement.name)
    return sorted(names)


def pins(names: list[str]) -> list[str]:
    """Return the lines of constraints.txt for these packages."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    by_name = {canonicalize_name(line.partition("==")[0]): line for line in lines if "==" in line}
    return [by_name[canonicalize_name(name)] for name in names]


def fetch_wheels(folder: Path) -> None:
    """Download missing wheels, and remove those whose version is not the pinned one."""
    wanted = pins(with_requirements(PACKAGES))
    for wheel in folder.glob("*.whl"):
        name, version, *_ = wheel.name.split("-")
        if pins([name])[0].partition("==")[2] != version:
            wheel.unlink()
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--python-version", "3.12", "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *wanted], check=True)


def copy_mnist(folder: Path) -> None:
    """Write MNIST's four files, from SAMPIMP_DATA or downloaded, after checking their digests."""
    folder.mkdir(exist_ok=True)
    for file in MNIST_FILES:
        if not (folder / f"{file}.gz").exists():
            content = read_mnist_file(file)
            (folder / f"{file}.gz").write_bytes(gzip.compress(content, mtime=0))


def size(files: list[Path]) -> int:
    """Return the bytes of files."""
    return sum(file.stat().st_size for file in files if file.is_file())


def main(folder: Path = ROOT / "gpu-wheels") -> int:
    """Fill the folder, print its contents, and return the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    fetch_wheels(folder)
    copy_mnist(folder / "mnist")
    files = sorted(folder.rglob("*"))
    for file in files:
        if file.is_file():
            print(f"{file.stat().st_size / 1e6:7.2f} MB  {file.relative_to(folder)}")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    checkout = size([ROOT / name for name in listed.stdout.split("\0") if name])
    together = size(files) + checkout
    print(f"{together / 1e6:7.2f} MB  with {checkout / 1e6:.2f} MB of the checkout, in {folder}")
    if together > LIMIT:
        print(f"Expected at most {LIMIT / 1e6:.0f} MB: take packages out of {Path(__file__).name}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__.partition("\n")[0]))
