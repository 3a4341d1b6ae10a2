"""Send a study from a laptop to a cluster of `ray up`, as a Ray job that survives the laptop.

The laptop runs `ray exec`, so that ssh is the only connection, and `ray exec` runs this module on
the head, where the dashboard and its secret are. `main` submits the job, or attaches to it, and
prints its log. The job does not depend on the connection.

    laptop   full_study.py --cluster YAML ... calls `send`, which runs
             ray exec YAML "python -m sampimp.sweeps.jobs ..."
    head     `main` submits the job full_study.py ... through JobSubmissionClient

`sampimp influence`, `retrain` and `subset` are sent in the same way, as jobs beside that of the
study, whose runs they wait for.

Map: `send`, `send_derived`, `check_sendable` (laptop); `main`, `choose` (head).
"""

import asyncio
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sampimp.errors import ConfigError, ResourceError
from sampimp.schema import digest_json

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from sampimp.sweeps.options import StudyConfig

DERIVED = ("influence", "retrain", "subset")
"""The other commands that are sent; on the head, their name and their OUT precede the options."""

MARK = "sampimp-job"
"""First word of the lines from `main` to `send`, among the lines of ssh and of the job."""


def send(config: "StudyConfig", arguments: Sequence[str], console: Console) -> int:
    """Run a study on the cluster of `config.cluster`, show its log, and return its exit code.

    Parameters
    ----------
    config
        The options of the study.
    arguments
        The command line of `full_study.py` that they come from.
    console
        Where the job's log is printed.

    Raises
    ------
    ConfigError
        An option names a path of this machine that the cluster cannot see.
    ResourceError
        The cluster does not take the job.
    """
    paths = {"--out": config.out, "--data-dir": config.data_dir}
    paths |= {
        f"--datasets {name}": name.partition(":")[2] for name in config.datasets if ":" in name
    }
    check_sendable(str(config.cluster), config.address, paths)
    return _send(str(config.cluster), without_cluster(arguments), console)


def send_derived(
    command: str,
    cluster: str,
    address: str | None,
    paths: Mapping[str, str],
    arguments: Sequence[str],
    console: Console,
) -> int:
    """Run a command of `DERIVED` on a cluster, as `send` runs a study.

    Parameters
    ----------
    command
        Its name.
    cluster, address
        Its options of these names.
    paths
        By option, the paths that the cluster has to see: OUT, and the files that it reads.
    arguments
        Its whole command line.
    console
        Where the job's log is printed.

    Raises
    ------
    ConfigError, ResourceError
        As for `send`.
    """
    check_sendable(cluster, address, paths)
    return _send(cluster, [command, paths["OUT"], *without_cluster(arguments)], console)


def _send(cluster: str, arguments: Sequence[str], console: Console) -> int:
    remote = shlex.join(["python", "-m", "sampimp.sweeps.jobs", *arguments])
    ray_exec = [_ray_program(), "exec", cluster]
    job = code = None
    output = []
    with subprocess.Popen(
        [*ray_exec, remote],
        stdin=subprocess.DEVNULL,  # else ssh sends key presses, Ctrl-C among them, to the head
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                words = line.split()
                if words[:1] != [MARK]:
                    if job is None:
                        output.append(line.strip())
                    else:
                        console.print(line.rstrip(), markup=False, highlight=False)
                elif words[1] == "ended":
                    code = int(words[2])
                    break
                else:
                    job = words[2]
                    console.print(_introduce(words, cluster))
        except KeyboardInterrupt:
            code = 130
        process.terminate()
    if job is None:
        raise ResourceError(
            expected="a cluster that takes the study as a job",
            got=_last_words(output),
            where=cluster,
            todo=f"start it, or bring it up to date with this checkout: ray up {cluster}",
        )
    if code is None or code == 130:
        lost = "The connection is lost" if code is None else "Detached"
        stop = shlex.join(["ray", "exec", cluster, f"ray job stop {job}"])
        console.print(
            f"{lost}; the study goes on as job {job}.\n"
            f"To attach to it: the same command. Stop it: {stop}",
            highlight=False,
        )
        return 130
    return code


def check_sendable(cluster: str, address: str | None, paths: Mapping[str, str | None]) -> None:
    """Raise ConfigError for an option that has no meaning, or a different meaning, on a cluster.

    Parameters
    ----------
    cluster, address
        The options of these names.
    paths
        By option, the paths that the cluster has to see.
    """
    if not Path(cluster).is_file():
        raise ConfigError(
            expected="the YAML file of a cluster",
            got="none",
            where=f"option --cluster {cluster}",
            todo="name cluster.yaml or cluster-local.yaml, with your values in it",
        )
    if address is not None:
        raise ConfigError(
            expected="one cluster",
            got=f"--cluster {cluster} and --address {address}",
            where="the command line",
            todo="leave one of them out",
        )
    for option, path in paths.items():
        if path is not None and not path.startswith(("/", "s3://")):
            raise ConfigError(
                expected="a place that every node of the cluster sees: s3://BUCKET/NAME, or the "
                "absolute path of a file system that the nodes share",
                got=f"{path}, which is in this folder on this machine",
                where=f"option {option}, with --cluster",
                todo="name such a place",
            )


def without_cluster(arguments: Sequence[str]) -> list[str]:
    """Return a command line without its --cluster.

    Examples
    --------
    >>> without_cluster(["--epochs", "5", "--cluster", "a.yaml", "--out", "s3://b/c"])
    ['--epochs', '5', '--out', 's3://b/c']
    >>> without_cluster(["--cluster=a.yaml", "--epochs", "5"])
    ['--epochs', '5']
    """
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--cluster":
            next(rest, None)
        elif not argument.startswith("--cluster="):
            kept.append(argument)
    return kept


def _ray_program() -> str:
    """Return the command `ray` of this environment, else that of PATH."""
    return shutil.which("ray", path=sysconfig.get_path("scripts")) or shutil.which("ray") or "ray"


def _introduce(words: Sequence[str], cluster: str) -> str:
    if words[1] == "sent":
        message = f"The study runs as job {words[2]} on {cluster}."
    elif words[1] == "found":
        message = f"The study runs already, as job {words[2]} on {cluster}; its log from the start:"
    else:
        message = (
            f"The study runs already, as job {words[2]} on {cluster}, with OTHER OPTIONS than "
            "these, which are not used; its log from the start:"
        )
    return f"{message} Ctrl-C leaves it running."


def _last_words(output: Sequence[str]) -> str:
    # ssh's own command line, which Ray repeats when a command fails, does not help a user.
    lines = [line for line in output if line and not line.startswith(("ssh ", "Error: Command"))]
    return lines[-1] if lines else "no answer"


# On the head.


def main(arguments: Sequence[str]) -> int:
    """Submit a study to the Ray cluster of this machine, or find it there; print its log."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    from sampimp.sweeps.options import parse

    client = JobSubmissionClient()
    module, study, options = "full_study", "", list(arguments)
    if options[:1] and options[0] in DERIVED:
        module, out, *options = options
        study = f"{module} of {out.rstrip('/')}"
    else:
        study = parse(options).out.rstrip("/")
    entrypoint = shlex.join([sys.executable, "-u", "-m", f"sampimp.sweeps.{module}", *options])
    job, running, next_id = choose(client.list_jobs(), study)
    if job is None:
        # A second laptop at the same moment uses the same id, and Ray refuses it.
        job = client.submit_job(
            entrypoint=entrypoint, submission_id=next_id, metadata={"study": study}
        )
        print(MARK, "sent", job, flush=True)
    else:
        print(MARK, "found" if running == entrypoint else "differs", job, flush=True)
    asyncio.run(_print_log(client.tail_job_logs(job)))
    details = client.get_job_info(job)
    code = 0 if details.status == JobStatus.SUCCEEDED else details.driver_exit_code
    if code is None:  # the job was stopped, or its head was lost; the log does not show it
        print(details.message)
        code = 1
    print(MARK, "ended", code, flush=True)
    return 0  # the error is printed already; Ray would print the command line of ssh as well


def choose(jobs: Iterable["JobDetails"], study: str) -> tuple[str | None, str | None, str]:
    """Return the running job of a study and its command, or None, and the id of the next job.

    Two drivers of one study at a time would train every trial twice.
    """
    name = f"sampimp-{digest_json(study)[:8]}"
    count, running = 0, None
    for job in jobs:
        match = re.fullmatch(rf"{name}-(\d+)", job.submission_id or "")
        if match:
            count = max(count, int(match[1]))
            if not job.status.is_terminal():
                running = job
    if running is None:
        return None, None, f"{name}-{count + 1}"
    return running.submission_id, running.entrypoint, f"{name}-{count + 1}"


async def _print_log(chunks) -> None:  # type: ignore[no-untyped-def]
    async for chunk in chunks:
        print(chunk, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
