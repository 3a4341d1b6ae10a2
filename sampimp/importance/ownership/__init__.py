"""Prove which sample each row of an output gradient belongs to.

A rule computes per-sample gradients from a layer's input and output gradient, row by row: correct
only if each row belongs to one sample, which depends on all operations of the model and the loss. A
list of permitted operations is not enough: it passed 56 of 85 patterns that mix or move samples. So
the mapping is not inferred from shapes or names. It is proved on the graph of the step, before the
backward pass.

Definitions (the file of each subject is in parentheses):

v_i
    Weight of sample i in the objective, sum_i v_i l_i, with v_i = 1 in training (Gao & Jojic 2017,
    section 2). Importance is defined by the derivative of the update with respect to v_i.
use
    One forward call with parameters (`use`). The proof is about its output gradient.
row, owner
    A row is one position on the axes of an output that may hold samples, with all features at that
    position. Its owner is the one sample that its gradient depends on.
layout
    How the owners are arranged along one axis: one row per sample; samples and positions joined,
    sample-major or position-major; or a list (`layout`).
cut
    Edges of autograd's graph between the loss and the uses, on which rows belong to samples: the
    edges of the model's outputs, else the first edges below the loss with an axis of N samples
    (`cut`).
sign pattern
    A choice of v_i = 1 or -1 for each sample (`signs`).

The argument:

1. If the part of the graph above the cut is a sum over samples, then multiplying the gradient on
   the cut's edges by the v_i of the rows' samples gives the gradient of sum_i v_i l_i below.
   Whether it is a sum is tested by the names of its operations, by its second derivative, and by
   changes of the model's outputs (`coupling`, `tape`). A loss that couples samples is refused.
2. Every output gradient below the cut is then linear in v. A row with one owner i is v_i times the
   row of the plain pass, so under a sign pattern it is unchanged or negated, bit for bit, since a
   change of sign is exact in every floating-point format.
3. There is one pass for each bit of i + 1, with v_i = -1 where the bit is set (i + 1, so that every
   sample is negated at least once). The passes in which
   a row is negated are the bits of its owner's i + 1. A row A + B, with A from the samples whose
   bit is set and B from all others, becomes -A + B, which is neither the row nor its negative
   unless A or B is zero. Any two samples differ in some bit, so a row that depends on several
   samples is found and refused, unless their parts cancel exactly.
4. A last pass with v_i = 2 for every other sample finds rows that are divided by a norm over the
   batch, which does not change with signs. With the plain pass, that makes ceil(log2(N + 1)) + 2
   passes. None computes a gradient of a parameter, and none leaves a trace (`passes`).
5. Steps 1 to 4 number the owners by their row of the loss. The uses whose input is data show which
   samples these are, since the order of the data is followed through the block (`data_rows`,
   `loss_order`). A product has the rows that its factors agree on (`product_rows`). An operation on
   data that no table lists has to keep each sample on its row (`row_keeping`). Writes into a view
   change the tensors that share its memory (`shared_storage`).
6. What is not seen is assumed (`assumed_rows`), and has two witnesses: labels that the block
   reorders may not contradict it (`loss_order`), nor may the values of rows (`row_values`).

Cost and validity:

A proved step takes 2 to 8 times a plain one and 1.0 to 1.7 times its memory. The recorder proves
each sequence of operations, with the flow of tensors through them, once an epoch. It proves again
while a parameter is all zero, which may hide mixing below it (for at most 8 steps), and in every
step in which a gradient is zero, several layouts fit, or an operation moves samples by value
(`value_moves`).

Limits:

- Between two proofs, passes with the same signature (operations, connections, axes) are assumed to
  treat samples alike. Mixing that depends on values alone, as in a mask of attention between
  samples, in `where`, or behind a buffer that is zero at first, is found in the first step of the
  next epoch.
- A piecewise linear coupling is tested only if the loss is computed outside the model, in the first
  step of an epoch, by changes of up to eight standard deviations of the outputs. In all other cases
  only the second derivative is tested. A loss without a second derivative is recorded with a
  warning.
- Data reordered by NumPy, lists or compiled functions are taken to be in the batch's order where
  no witness contradicts, and so are data that a matrix of N rows mixes from the left. A second
  tensor of N rows is taken to hold further rows of the batch's samples. A tensor of N rows in a
  plain attribute is taken for data, and its use is refused as mixing samples if it is not:
  register it as a buffer.
- An operation below the cut that is not linear in the gradient of one sample (a hook that clips
  each value) is not noticed, and what it returns is taken for the sample's gradient.
- On devices without deterministic sums, rows are compared within 64 times the rounding error.

Files, in the order in which to read them:

- `use`, `layout`: the forward calls that the proof is about, and the layouts that it finds.
- `signs`, `cut`, `passes`: the passes with signs, and owners from their gradients.
- `operations`, `tape`, `coupling`: whether the loss is a sum over samples.
- `call`, `row_notes`, `assumed_rows`, `row_numbers`, `product_rows`, `shared_storage`,
  `row_keeping`, `row_values`, `data_rows`, `loss_order`: which sample each row of the loss belongs
  to.
- `proof`: the whole proof of one backward pass; `refusals`: its errors.
- `value_moves`: which steps are proved each time.
"""
