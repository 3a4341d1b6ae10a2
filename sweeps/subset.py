"""Train on subsets of a study's samples: which of them suffice, by which rule.

python sweeps/subset.py OUT --rules tau-high strata power --sizes 0.05 0.1 0.3 --seeds 1 2 3 4 5
python sweeps/subset.py OUT --within 0.3 --dry-run

`sampimp subset` is the same command; `sampimp.sweeps.subset_study` prepares it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from rich.console import Console

from sampimp.errors import ConfigError
from sampimp.sweeps.derived_command import EXIT_CODES, DerivedOptions, run_derived
from sampimp.sweeps.door import run_door
from sampimp.sweeps.options import unset_option

if TYPE_CHECKING:
    from sampimp.store.location import Folder
    from sampimp.sweeps.derived_study import DerivedStudy
    from sampimp.sweeps.subset_study import SubsetRequest

_HELP = """Select subsets of the training samples by several rules, and train on them alone.

Every subset is trained with as many updates as all samples make in the study's epochs (steps), and
with as many passes (epochs). All samples are trained as well, also to convergence. No rule sees a
test label. The parameters of strata and power, and `chosen`, the best rule at a size and budget,
come from a tenth of the training samples (validation).

Rules:
  random, balanced       always compared: drawn at random, from all or equally from each class
  tau-high, tau-low      the most, or least, important samples
  nll-high, nll-low      those of the highest, or lowest, NLL at the end of training
  strata, strata:0.1     equally many from each bin of importance, without the hardest 10 %
  power, power:0.25      drawn with p proportional to importance^0.25
  final-importance       those that moved the final parameters most (sampimp influence first)
  metagradient           found by exchange, from the derivative of training: 20 reverse passes
  scores:FILE            the highest of your own numbers, one a sample (.npy or text)
  variable:NAME          the highest of a variable of the cube

Examples:
  {prog} results/mnist
  {prog} results/mnist --rules tau-high metagradient --sizes 0.05 0.3 --seeds 1 2 3
  {prog} results/mnist --within 0.3

"""

NAMED = 6
"""Diverged trainings that are named; the cube names all (arbitrary)."""

BISECTION_ROUNDS = 12
"""Most rounds of a bisection: each halves the distance in log size."""


@dataclass(frozen=True, kw_only=True)
class _Subsets:
    rules: tuple[str, ...] = ("tau-high", "nll-high", "strata", "power")
    """Who is kept, as above."""
    sizes: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
    """Shares of the samples, between 0 and 1, separated by spaces."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Of initialisation, order and random draws."""
    within: Annotated[float | None, unset_option("POINTS")] = None
    """Also search, for each rule and budget, the smallest size whose test error is within so many
    percentage points of that of all samples, by bisection."""


@dataclass(frozen=True, kw_only=True)
class SubsetOptions(DerivedOptions, _Subsets):
    """Options of `sampimp subset`; importance and NLL of the runs are what rules select by."""

    @cached_property
    def request(self) -> "SubsetRequest":
        """What to compare; a file of scores is read once."""
        # Here, since `--help` needs neither Ray nor PyTorch.
        from sampimp.sweeps.subset_study import SubsetRequest

        if self.within is not None and not 0 <= self.within < 100:
            raise ConfigError(
                expected="percentage points of the test error, 0 or above and below 100",
                got=f"{self.within:g}",
                where="option --within",
                todo="change the value, such as 0.3",
            )
        return SubsetRequest(
            rules=self.rules,
            sizes=self.sizes,
            seeds=self.seeds,
            runs=self.runs,
            model=self.model,
        )

    def files(self) -> dict[str, str]:
        """See `DerivedOptions`."""
        named = (rule.partition(":") for rule in self.rules)
        return {f"--rules scores:{path}": path for name, _, path in named if name == "scores"}

    def prepare(self, folder: "Folder") -> "DerivedStudy":
        """See `DerivedOptions`."""
        from sampimp.sweeps.subset_study import prepare_subsets

        return prepare_subsets(folder, self.request, stores_scores=not self.dry_run)

    def perform(self, console: Console) -> int:
        """Train every rule at every size, then those of the bisection; write the selections."""
        from sampimp.store.location import Folder
        from sampimp.sweeps.subset_results import diverged_trainings, export_subsets, next_sizes
        from sampimp.sweeps.subset_study import prepare_subsets

        code = super().perform(console)
        folder, request = Folder.of(self.out), self.request
        for _ in range(0 if self.within is None or self.dry_run else BISECTION_ROUNDS):
            left = [] if code else next_sizes(folder, request, (self.within or 0.0) / 100)
            if not left:
                break
            code = self.perform_units(prepare_subsets(folder, request, left), console)
        if self.dry_run and self.within is not None:
            console.print("The sizes that --within searches are not in this estimate.")
        if code or self.dry_run:
            return code
        exported = export_subsets(folder, request)
        _print_errors(folder, request, self.within, console)
        for line in (
            *_describe_diverged(diverged_trainings(folder)),
            *_describe_absent_classes(exported),
            f"The selected samples are in {len(exported)} files "
            f"{self.out}/influence/selected/*.npy, and in .csv with labels:",
            f'  torch.utils.data.Subset(train_set, numpy.load("{next(iter(exported))}"))',
        ):
            console.print(line, markup=False, highlight=False)
        return 0


def _print_errors(
    folder: "Folder", request: "SubsetRequest", within: float | None, console: Console
) -> None:
    """Print the test errors of each run, and the smallest sizes if they were searched."""
    from sampimp.schema import SUBSET_BUDGETS
    from sampimp.sweeps.error_tables import error_table, smallest_sizes_table
    from sampimp.sweeps.subset_results import smallest_sizes, trained_runs

    tables = [
        error_table(cube, budget, request.sizes, request.seeds, run.label)
        for run, cube in trained_runs(folder, request)
        for budget in SUBSET_BUDGETS[:2]
    ]
    if within is not None:
        found = smallest_sizes(folder, request, within / 100)
        tables += [smallest_sizes_table(sizes, within, run) for run, sizes in found.items()]
    for table in tables:
        console.print(table, soft_wrap=False)


def _describe_diverged(labels: Sequence[str]) -> list[str]:
    if not labels:
        return []
    more = f"; and {len(labels) - NAMED} more" if labels[NAMED:] else ""
    return [
        f"{len(labels)} trainings diverged; their error is NaN in the cube, and counts as 1 where "
        f"rules are chosen: {'; '.join(labels[:NAMED])}{more}."
    ]


def _describe_absent_classes(exported: Mapping[str, Sequence[str]]) -> list[str]:
    return [
        f"{path.rpartition('/')[2]} has no sample of class {', '.join(classes)}."
        for path, classes in exported.items()
        if classes
    ]


def main(arguments: list[str], prog: str = "subset.py") -> int:
    """Run the command line; return its exit code, which `--help` lists."""
    description = _HELP.format(prog=prog) + EXIT_CODES
    return run_derived("subset", SubsetOptions, description, arguments, prog)


if __name__ == "__main__":
    run_door(main)
