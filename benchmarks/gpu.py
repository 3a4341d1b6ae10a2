"""All measurements on a GPU, in at most eight minutes: exactness, cost, graphs, the paper's run.

    exactness   recorded importance against a float64 loop, bytes, waiting   exactness.md
    cost        a recorded step over a plain one, peak memory                cost.md
    graph       the paper's step in a CUDA graph                             graph.md
    paper       one reference run on MNIST, beside the CPU's                 paper.md

The script needs PyTorch, NumPy, rich and tyro, and no package index: `make gpu-wheels`
fetches the packages that a machine lacks, and `make gpu` installs them for the run. Each part is a
process with a time limit: an error inside CUDA ends that part only, and a part beyond its limit is
stopped; the other parts run. The tables and the printed lines (log.txt) are written to the folder
in the environment variable OUT, by default results/gpu. The exit status is 0 if exactness holds.
"""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from gpu_report import SUMMARY, one_line

ROOT = Path(__file__).parents[1]

PARTS = {"exactness": 200, "cost": 150, "graph": 45, "paper": 65}
"""Time limit of each part in seconds, the start of its process included."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Device and parts."""

    device: Literal["cuda", "cpu"] = "cuda"
    """Device; on a CPU, the rows that only a GPU can fill say "needs CUDA"."""
    quick: bool = False
    """A part of every measurement, with synthetic images for MNIST: a test of the script."""
    part: Literal["", "exactness", "cost", "graph", "paper"] = ""
    """Run one part in this process, without a limit."""
    reference: bool = False
    """Only compute and store the reference run on MNIST on the CPU (4 minutes)."""


class Log:
    """Prints lines and writes them to a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        self.summary: list[str] = []

    def write(self, line: str) -> None:
        """Print and write a line, and keep it if it belongs to the summary."""
        print(line, flush=True)
        print(line, file=self._file, flush=True)
        if line.startswith(SUMMARY):
            self.summary.append(line.removeprefix(SUMMARY))


def run_part(name: str, command: Sequence[str], limit: float, log: Log) -> bool:
    """Run a part and log its output; return whether it succeeded within its limit."""
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    stopped = threading.Event()

    def watch() -> None:
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            stopped.set()
        with contextlib.suppress(ProcessLookupError):  # a compiler's workers may outlive the part
            os.killpg(process.pid, signal.SIGKILL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    for line in process.stdout:
        log.write(line.rstrip("\n"))
    watcher.join()
    code, seconds = process.wait(), time.monotonic() - start
    if stopped.is_set():
        outcome = f"stopped after its limit of {limit:.0f} s; its table has the rows until then"
    else:
        outcome = f"{'done' if code == 0 else f'FAILED with status {code}'} in {seconds:.0f} s"
    log.write(f"{SUMMARY}{name}: {outcome}")
    return code == 0 and not stopped.is_set()


def run_here(name: str, device: str, quick: bool, out: Path) -> int:
    """Run a part in this process and return its exit status."""
    try:
        part = importlib.import_module(f"gpu_{name}")
        return 0 if part.run(device, quick, out) else 1
    except Exception as error:  # of any kind: the summary names it
        traceback.print_exc()
        print(f"{SUMMARY}{name}: {one_line(error)}", flush=True)
        return 1


def main(config: Config) -> int:
    """Run the parts one after the other; return the exit status."""
    out = Path(os.environ.get("OUT") or ROOT / "results" / "gpu")
    out.mkdir(parents=True, exist_ok=True)
    if config.reference:
        importlib.import_module("gpu_paper").write_reference()
        return 0
    if config.part:
        return run_here(config.part, config.device, config.quick, out)
    start = time.monotonic()
    log = Log(out / "log.txt")
    done = {}
    for name, limit in PARTS.items():
        command = [sys.executable, "-u", __file__, "--part", name, "--device", config.device]
        command += ["--quick"] if config.quick else []
        done[name] = run_part(name, command, limit, log)
    log.write(f"\nAfter {time.monotonic() - start:.0f} s, in {out}:")
    for line in log.summary:
        log.write(f"  {line}")
    return 0 if done["exactness"] else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__.partition("\n")[0])))
