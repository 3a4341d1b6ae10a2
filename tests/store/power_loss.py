"""Cut the power of a study after random operations, and compare what the same command then makes.

python tests/store/power_loss.py --cuts 200 --seed 1
"""

import random
import sys
import tempfile
from pathlib import Path

import tyro
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from power_cuts import check_cut, record_study


def main(cuts: int = 200, seed: int = 1) -> None:
    """Cut the power at random, half the time with every epoch durable.

    Parameters
    ----------
    cuts
        Number of power cuts.
    seed
        Seed of when the power is cut, and of what it leaves.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        recordings = []
        for name in ("epochs", "commits"):
            disk = Path(scratch) / name
            disk.mkdir()
            recordings.append(record_study(disk, is_durable=name == "epochs"))
        for number in track(range(cuts), "Cutting the power"):
            recording = recordings[number % 2]
            cut = chance.randrange(len(recording.operations))
            check_cut(recording, cut, Path(scratch) / str(number), chance.randrange(2**32))
    print(f"{cuts} power cuts: nothing that was reported is lost, and all values are identical.")


if __name__ == "__main__":
    tyro.cli(main)
