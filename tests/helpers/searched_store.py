"""A store whose trials are made by hand, for tests of the searcher: attempts, errors, commits.

Map: `searched_plan`, `SearchedStore`.
"""

from sampimp.config import TrainingConfig
from sampimp.store.attempts import Trace, claim_attempt, require_newest
from sampimp.store.commits import create_commit
from sampimp.store.location import Folder
from sampimp.store.plan import DatasetInfo, Plan, read_commits
from sampimp.sweeps.searcher import UnitSearcher
from sampimp.sweeps.work import training_units

EPOCHS = 2
HISTORY = {
    "parts": [[0, "record.zarr"]],
    "digests": {"importance": [["1"], ["2"]], "nll": [["3"], ["4"]]},
    "curves": {},
}


def searched_plan(grid, keys=("a",)):
    info = DatasetInfo(
        name="made",
        digest="d" * 64,
        sample_count=6,
        test_count=2,
        input_shape=(2,),
        class_names=("0", "1"),
        layers=(("Out", 4), ("Out", 2)),
    )
    training = TrainingConfig(epochs=EPOCHS)
    return Plan(datasets=dict.fromkeys(keys, info), training=training, grid=grid)


class SearchedStore:
    """The trials of a study, as the workers write them."""

    def __init__(self, folder, plan):
        self.folder, self.plan = Folder.of(folder), plan

    def searcher(self, plan=None):
        plan = plan or self.plan

        def resolve():
            return training_units(plan, plan.resolve(read_commits(self.folder)))

        return UnitSearcher(self.folder, resolve)

    def trial(self, config):
        return self.folder / "trials" / config["trial_id"]

    def begin(self, config):
        """Claim an attempt, as a worker does; return its number."""
        return claim_attempt(self.trial(config), Trace(*config["seen"]))

    def checkpoint(self, config, attempt, epoch):
        """Go on by an epoch, unless a newer attempt has begun."""
        require_newest(self.trial(config), attempt)
        name = f"checkpoints/epoch-{epoch:06d}-attempt-{attempt:04d}/MANIFEST.json"
        manifest = {
            "fingerprint": config["fingerprint"],
            "epoch": epoch,
            "sha256": "",
            "time": 0.0,
            "history": {**HISTORY, "seconds": [1.0]},
        }
        self.trial(config).write_json(name, manifest)

    def fail(self, config):
        """Begin an attempt and write the error that it fails with."""
        attempt = self.begin(config)
        self.trial(config).write_json(f"errors/{attempt:04d}.json", {"error": "broken", "time": 0})

    def commit(self, config, diverged_epoch=None, attempt=1):
        """Commit a trial; return whether this call did."""
        return create_commit(
            self.trial(config),
            {
                "fingerprint": config["fingerprint"],
                "diverged_epoch": diverged_epoch,
                "epochs": EPOCHS,
                "attempt": attempt,
                **HISTORY,
            },
        )
