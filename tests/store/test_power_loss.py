"""A power cut at any moment loses nothing that was reported, and blocks no command.

A study is recorded once; its operations on the disk are then cut off after each one that publishes
a file, and what a disk may have left is continued by the same command. `power_loss.py` cuts after
random operations.
"""

import pytest
from power_cuts import check_cut, is_cut, record_study


@pytest.mark.parametrize("is_durable", [True, False], ids=["epochs", "commits"])
def test_a_cut_after_any_publishing_operation_is_repaired_by_the_same_command(tmp_path, is_durable):
    (tmp_path / "disk").mkdir()
    recording = record_study(tmp_path / "disk", is_durable)
    numbers = range(1, len(recording.operations) - 1)
    cuts = [number for number in numbers if is_cut(recording.operations, number)]
    assert len(cuts) > 30
    for cut in cuts:
        check_cut(recording, cut, tmp_path / str(cut), seed=cut)
