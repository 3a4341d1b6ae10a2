"""The studies: which runs, on which machines. Ray lives here and nowhere else.

full_study.py        the door: the paper's study, the digits, or one's own
score_snapshots.py   the door to snapshot importance, also after a study is done
study.py             what a study is, and how it runs from plan to exit code
trial.py             one training run as Ray Tune sees it
searcher.py          which trial is next: what is missing, and whose reference is there
cluster.py           which machines
jobs.py              a study sent to a cluster from a laptop
progress.py          what a person sees meanwhile
ingest.py            image folders through Ray Data, once
snapshots.py         snapshot importance through Ray Data
"""

import os
import sys
from pathlib import Path

# Here, because Ray reads it when it is imported: `ray start` asks for the secret wherever there is
# one, and a driver shows it only when told to. A cluster that asks for none does not mind.
if "ray" not in sys.modules and (Path.home() / ".ray" / "auth_token").exists():
    os.environ.setdefault("RAY_AUTH_MODE", "token")

if __name__ == "sweeps":  # imported from a checkout's folder: `python -m sweeps.` and old imports
    from sampimp._renamed import alias_package

    alias_package("sweeps", "sampimp.sweeps")
