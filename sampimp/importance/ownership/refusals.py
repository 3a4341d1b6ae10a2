"""The errors of the proof: what it expected, what it found, where, and what to do.

Each function returns an `UnsupportedError` to be raised; `where` is the name of the layer.
"""

from sampimp.errors import UnsupportedError
from sampimp.importance.ownership.row_notes import is_data
from sampimp.importance.ownership.use import Use
from sampimp.importance.rules.batch import Batch


def samples_mixed(use: Use, where: str) -> UnsupportedError:
    """Return the error for rows that depend on several samples."""
    todo = "remove operations that mix samples: a mean over the batch, attention between samples"
    if use.data is not None or all(map(is_data, use.args)):
        todo += "; make a tensor that depends on no sample a buffer (register_buffer)"
    return UnsupportedError(
        expected="operations that treat each sample of a batch on its own",
        got=f"an output of {use.name} in whose gradient a row depends on several samples: an "
        "operation between it and the loss mixes samples",
        where=where,
        todo=todo,
    )


def samples_misplaced(use: Use, where: str, batch: Batch) -> UnsupportedError:
    """Return the error for an output whose samples are on none of the possible axes."""
    axis = use.axes(batch)[:1]
    return UnsupportedError(
        expected=f"{batch.size} samples on axis {axis[0] if axis else 0}, one for each index of "
        "the step, or joined with positions",
        got=f"an output of {use.name} of shape {use.shapes[0]}, with its samples elsewhere",
        where=where,
        todo="move the samples to that axis; batch_dim=1 says that positions come before samples",
    )


def no_samples_above(use: Use, where: str, batch: Batch) -> UnsupportedError:
    """Return the error for a graph without an axis of samples between the loss and a use."""
    return UnsupportedError(
        expected=f"{batch.size} samples on axis {batch.dim} of the model's output, or of another "
        "tensor that the loss is made of, one for each index of the step",
        got=f"none between the loss and a layer whose output has shape {use.shapes[0]}",
        where=where,
        todo="pass one index per sample of the batch; for a batch in parts, one list per part: "
        "step([index_1, index_2], ...); set batch_dim=1 if positions come before samples",
    )


def order_unknown(use: Use, where: str) -> UnsupportedError:
    """Return the error for data whose rows are in an unknown order."""
    return UnsupportedError(
        expected="data in the order of the step's index, or reordered inside the block by whole "
        "rows",
        got="data whose rows could not be matched with the step's samples",
        where=where,
        todo="put the batch into its order outside the block",
    )


def labels_disagree(use: Use, where: str) -> UnsupportedError:
    """Return the error for labels in another order than the data, as far as that was seen."""
    return UnsupportedError(
        expected="data and labels in the same order",
        got="labels that the block reorders, and data that it does not, as far as PyTorch shows",
        where=where,
        todo="reorder data by whole rows of a tensor with an axis of samples, as in data[order], "
        "or put the batch into its order outside the block; batch_dim=1 says that positions come "
        "before samples",
    )


def backward_not_repeatable(error: Exception) -> UnsupportedError:
    """Return the error for a graph that failed in a further backward pass."""
    return UnsupportedError(
        expected="a backward pass that can be run several times",
        got=(str(error).strip() or type(error).__name__).splitlines()[0],
        where="the step",
        todo="remove code that allows only one, such as checkpoint(use_reentrant=True)",
    )
