"""The studies: which runs, on which machines. Ray lives here and nowhere else.

full_study.py        the door: the paper's study, the digits, or one's own
score_snapshots.py   the door to snapshot importance, also after a study is done
study.py             what a study is, and how it runs from plan to exit code
trial.py             one training run as Ray Tune sees it
searcher.py          which trial is next: what is missing, and whose reference is there
cluster.py           which machines
progress.py          what a person sees meanwhile
ingest.py            image folders through Ray Data, once
snapshots.py         snapshot importance through Ray Data
"""
