"""Squared norms of per-sample gradients, kept from step to step until importance is formed.

A step leaves one number for each parameter and sample: the squared norm of the sample's part of
the update. They stay on the model's device until an epoch is read, so a step on an accelerator does
not wait for a transfer.

Map: `NormBuffer` (the numbers of many steps), `StepNorms` (those of the current step, with the
factors from which they are computed; `StepNorms.take` multiplies by rate^2 and sums them to beta
per layer).
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sampimp.errors import UnsupportedError
from sampimp.importance.gradients import Factor, squares
from sampimp.importance.model_tensors import ModelTensors
from sampimp.importance.update import Derivative, Diagonal


class NormBuffer:
    """A growing table with R numbers for each sample of each step.

    One tensor is kept and enlarged. With thousands of small tensors between the large ones of
    autograd, memory was fragmented, and page faults took up to 10 % of a step.

    Parameters
    ----------
    row_count
        Numbers for each sample, R.
    """

    def __init__(self, row_count: int) -> None:
        self._table = torch.empty(row_count, 0)
        self._filled = 0
        self._rates: list[tuple[int, list[float]]] = []  # batch size and rates of each step

    def rows(self, size: int, like: Tensor) -> Tensor:
        """Return the view into which a step over `size` samples writes, shape (R, size)."""
        end, room = self._filled + size, self._table.shape[1]
        if end > room or like.dtype != self._table.dtype or like.device != self._table.device:
            larger = like.new_empty(len(self._table), room if end <= room else max(2 * room, end))
            larger[:, :room] = self._table
            self._table = larger
        return self._table[:, self._filled : end]

    def accept(self, size: int, rates: list[float]) -> None:
        """Keep the step just written, with the rates that all its samples share."""
        self._rates.append((size, rates))
        self._filled += size

    def read(self) -> tuple[Tensor, Tensor]:
        """Return the numbers of all steps since the last `take`.

        Returns
        -------
        rows
            Shape (R, samples), on the CPU.
        rates
            The rates of each sample's step, shape (rates, samples).
        """
        rows = self._table[:, : self._filled].cpu()
        sizes = torch.tensor([size for size, _ in self._rates])
        rates = torch.tensor([rates for _, rates in self._rates], dtype=rows.dtype)
        return rows, rates.repeat_interleave(sizes, 0).T

    def take(self) -> tuple[Tensor, Tensor]:
        """Return what `read` returns, and empty the buffer."""
        rows, rates = self.read()
        self._filled = 0
        self._rates = []
        return rows, rates


class StepNorms:
    """The squared norms of one step, from its backward passes to the end of its update.

    Under an optimizer with one rate per parameter, a pass writes the squared norms at once. Under
    an elementwise derivative D they can be computed only after the update, so the factors are kept.

    Parameters
    ----------
    tensors
        The model's parameters.
    """

    def __init__(self, tensors: ModelTensors) -> None:
        self._tensors = tensors
        self._buffer = NormBuffer(len(tensors.parameters))
        self.undefined_layers: set[int] = set()
        """Positions of the layers without importance in at least one step."""

    def begin_step(self, sample_count: int) -> None:
        """Forget the previous step, and expect `sample_count` samples."""
        self._sample_count = sample_count
        self._table: Tensor | None = None  # (parameters, samples of the step)
        self._kept: list[tuple[slice, dict[int, Factor]]] = []  # one entry for each pass
        self._sources: list[tuple[Tensor, int]] = []  # tensors that the kept factors use; versions

    def grow(self, sample_count: int) -> None:
        """Make room for one more pass, `sample_count` samples in the whole step."""
        self._sample_count = sample_count
        if self._table is not None:
            written = self._table.shape[1]
            self._table = self._buffer.rows(sample_count, self._table)
            self._table[:, written:] = 0

    def keep(self, samples: slice, factors: dict[int, Factor]) -> None:
        """Keep a pass's factors, by row of the parameter, until the update."""
        self._kept.append((samples, factors))

    def take_factors(self) -> list[dict[int, Factor]]:
        """Return the kept factors of each pass, by row of the parameter, and forget them."""
        factors = [factors for _, factors in self._kept]
        self._kept, self._sources = [], []
        return factors

    def keep_sources(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors that kept factors use, and their versions."""
        self._sources += [(tensor, tensor._version) for tensor in tensors]

    def write(self, samples: slice, values: Mapping[int, Tensor]) -> None:
        """Write a pass's squared norms, by row of the parameter; the other rows become 0."""
        if values:
            first = next(iter(values.values()))
            rows = self._rows_like(first)[:, samples]
            zero = rows.new_zeros(rows.shape[1])
            for row, norms_N in values.items():
                if norms_N.shape != zero.shape:
                    raise UnsupportedError(
                        expected=f"{len(zero)} samples, one for each index of the step",
                        got=f"norms of shape {tuple(norms_N.shape)}",
                        where=self._tensors.place(row),
                        todo="pass as many indices as the batch has samples",
                    )
            norms_of_rows = [values.get(row, zero) for row in range(len(rows))]
            torch.stack([norms_N.to(rows) for norms_N in norms_of_rows], out=rows)

    def _rows_like(self, like: Tensor) -> Tensor:
        """Return the step's part of the buffer; it is 0 where nothing has been written yet."""
        if self._table is None:
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            self._table = self._buffer.rows(self._sample_count, like.new_empty(0, dtype=dtype))
            self._table.zero_()
        return self._table

    @torch.no_grad()
    def finish(
        self,
        derivatives: Mapping[int, Derivative],
        scales: Iterable[tuple[int, int, Tensor | float]],
        used: Iterable[int],
        undefined: Iterable[int],
    ) -> None:
        """Complete the step's norms after its update.

        Parameters
        ----------
        derivatives
            d(update)/d(gradient), by id of the parameter. Empty if no update was made.
        scales
            Factors by which gradients were scaled: row of the parameter, number of samples whose
            gradients were scaled (the first ones of the step), factor.
        used
            Rows of the parameters that the step used.
        undefined
            Rows of the parameters without importance in this step.

        Raises
        ------
        UnsupportedError
            A tensor that the kept factors use was changed in place.
        """
        if any(tensor._version != version for tensor, version in self._sources):
            raise UnsupportedError(
                expected="batches and activations that are not changed until the update",
                got="a tensor that was changed in place after its backward pass",
                where="the step",
                todo="make a new tensor for each batch that is accumulated",
            )
        parameters = self._tensors.parameters
        rates = self._rates_of_rows(derivatives)
        for samples, factors in self._kept:
            values = {
                row: squares(factor, derivatives.get(id(parameters[row]), 0.0))
                for row, factor in factors.items()
            }
            self.write(samples, values)
        table = self._rows_like(parameters[0])
        for row, end, scale in scales:
            table[row, :end] *= scale**2
        for row in used:
            if id(parameters[row]) not in derivatives:
                table[row] = 0  # also where it was NaN
        self._kept, self._sources = [], []
        self._finished = self._sample_count, rates
        self._leave_out(undefined)

    def _rates_of_rows(self, derivatives: Mapping[int, Derivative]) -> list[float]:
        """Return the rate of each parameter; 1 where D is already in the squared norms."""
        rates = []
        for parameter in self._tensors.parameters:
            derivative = derivatives.get(id(parameter), 0.0)
            if not isinstance(derivative, Diagonal):
                rates.append(float(derivative))
                continue
            rates.append(1.0)
            if len(self._kept) > 1:
                derivative.square()  # once, for all passes
        return rates

    def _leave_out(self, rows: Iterable[int]) -> set[int]:
        """Make the importance of parameters NaN in the finished step; return their layers."""
        _, rates = self._finished
        rows = list(rows)
        for row in rows:
            rates[row] = torch.nan
        layers = {int(self._tensors.layer_of_row[row]) for row in rows}
        self.undefined_layers |= layers
        return layers

    def leave_out(self, parameters: Sequence[Tensor]) -> set[int]:
        """Make the importance of parameters NaN in the finished step; return their layers."""
        rows = self._tensors.rows
        return self._leave_out({rows[id(p)] for p in parameters if id(p) in rows})

    def accept(self) -> None:
        """Keep the finished step."""
        self._buffer.accept(*self._finished)

    def read(self) -> Tensor:
        """Return beta (layer, samples) of all steps since the last `take`, and keep them.

        On the CPU, with the layers in the order of registration. A step may be under way.
        """
        return self._beta(*self._buffer.read())

    def take(self) -> Tensor:
        """Return what `read` returns, and forget the steps."""
        return self._beta(*self._buffer.take())

    def _beta(self, rows: Tensor, rates: Tensor) -> Tensor:
        beta = rows.new_zeros(len(self._tensors.layers), rows.shape[1])
        return beta.index_add_(0, self._tensors.layer_of_row, rows * rates.square())
