"""A study sent from a laptop to a cluster of `ray up`: a Ray job that lives on without the laptop.

The laptop only runs `ray exec`, so that ssh is the one way in, and what it runs on the head is this
module: there, next to the dashboard and its secret, the job is submitted or found, and its log
followed. Whatever becomes of the connection, the job does not notice.

    laptop   full_study.py --cluster YAML ...: send -> ray exec YAML "python -m sampimp.sweeps.jobs
    ..."
    head     main -> JobSubmissionClient -> full_study.py ..., a job
"""

import asyncio
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sampimp.errors import ConfigError, ResourceError
from sampimp.schema import digest_json

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from sampimp.sweeps.options import StudyConfig

SPEECH = "sampimp-job"
"""First word of the lines that the head says to the laptop, among those of ssh and of the job."""


def send(config: "StudyConfig", arguments: Sequence[str], console: Console) -> int:
    """Run a study on the cluster of `config.cluster`, show its log, and return its exit code.

    Parameters
    ----------
    config
        What `arguments` mean.
    arguments
        The command line of `full_study.py`.
    console
        Where to show the job's log.

    Raises
    ------
    ConfigError
        An option names something of this machine that the cluster cannot see.
    ResourceError
        The cluster does not take the job.
    """
    check_sendable(config)
    cluster = str(config.cluster)
    remote = shlex.join(["python", "-m", "sampimp.sweeps.jobs", *without_cluster(arguments)])
    ray_exec = [sys.executable, "-m", "ray.scripts.scripts", "exec", cluster]
    job = code = None
    chatter = []
    with subprocess.Popen(
        [*ray_exec, remote],
        stdin=subprocess.DEVNULL,  # else ssh takes the keys, Ctrl-C among them, to the head
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                words = line.split()
                if words[:1] != [SPEECH]:
                    if job is None:
                        chatter.append(line.strip())
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
            got=_last_words(chatter),
            where=cluster,
            todo=f"start it, or bring it up to date with this checkout: ray up {cluster}",
        )
    if code is None or code == 130:
        lost = "The connection is lost" if code is None else "Detached"
        stop = shlex.join(["ray", "exec", cluster, f"ray job stop {job}"])
        console.print(
            f"{lost}; the study goes on as job {job}.\n"
            f"Come back: the same command. Stop it: {stop}",
            highlight=False,
        )
        return 130
    return code


def check_sendable(config: "StudyConfig") -> None:
    """Raise ConfigError for what means nothing, or something else, on a cluster."""
    if not Path(str(config.cluster)).is_file():
        raise ConfigError(
            expected="the YAML file of a cluster",
            got="none",
            where=f"option --cluster {config.cluster}",
            todo="name cluster.yaml or cluster-local.yaml, with your values in it",
        )
    if config.address is not None:
        raise ConfigError(
            expected="one cluster",
            got=f"--cluster {config.cluster} and --address {config.address}",
            where="the command line",
            todo="leave one of them out",
        )
    paths = {"--out": config.out, "--data-dir": config.data_dir}
    paths |= {
        f"--datasets {name}": name.partition(":")[2] for name in config.datasets if ":" in name
    }
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


def _introduce(words: Sequence[str], cluster: str) -> str:
    if words[1] == "sent":
        said = f"The study runs as job {words[2]} on {cluster}."
    elif words[1] == "found":
        said = f"The study runs already, as job {words[2]} on {cluster}; its log from the start:"
    else:
        said = (
            f"The study runs already, as job {words[2]} on {cluster}, with OTHER OPTIONS than "
            "these, which are not used; its log from the start:"
        )
    return f"{said} Ctrl-C leaves it running."


def _last_words(chatter: Sequence[str]) -> str:
    # ssh's own command line, which Ray repeats when a command fails, tells a person nothing.
    said = [line for line in chatter if line and not line.startswith(("ssh ", "Error: Command"))]
    return said[-1] if said else "no answer"


# ------------------------------------------------------------------------------ on the head


def main(arguments: Sequence[str]) -> int:
    """Submit a study to the Ray that runs here, or find it running, and print its log."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    from sampimp.sweeps.options import parse

    client = JobSubmissionClient()
    study = parse(list(arguments)).out.rstrip("/")
    entrypoint = shlex.join([sys.executable, "-u", "-m", "sampimp.sweeps.full_study", *arguments])
    job, running, next_id = choose(client.list_jobs(), study)
    if job is None:
        # A second laptop that asks at the same moment gets the same id and is refused.
        job = client.submit_job(
            entrypoint=entrypoint, submission_id=next_id, metadata={"study": study}
        )
        print(SPEECH, "sent", job, flush=True)
    else:
        print(SPEECH, "found" if running == entrypoint else "differs", job, flush=True)
    asyncio.run(_print_log(client.tail_job_logs(job)))
    details = client.get_job_info(job)
    code = 0 if details.status == JobStatus.SUCCEEDED else details.driver_exit_code
    if code is None:  # it was stopped, or its head was lost: the log says nothing of that
        print(details.message)
        code = 1
    print(SPEECH, "ended", code, flush=True)
    return 0  # what went wrong is said; Ray would print all of ssh's command line


def choose(jobs: Iterable["JobDetails"], study: str) -> tuple[str | None, str | None, str]:
    """Return the job and command that train a study now, if any, and the id of its next job.

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
