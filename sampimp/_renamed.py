"""Old import paths, for one release: each works, and a DeprecationWarning names the new path.

- `sampimp.capture`, `sampimp.rules`, ...: modules that no longer exist. A finder at the end of
  `sys.meta_path` makes an empty module whose attributes come from the new places (`MOVED`).
- Names that `sampimp.training`, `sampimp.data` and `sampimp.store` had while they were modules:
  the `__getattr__` of these packages (`moved`).
- The folders `sweeps/` and `analysis/` of a checkout, whose packages are `sampimp.sweeps` and
  `sampimp.analysis`: each calls `alias_package` if it is imported as a top-level package, as in
  `python -m analysis.report`, so that no file is loaded under two names.
"""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import CodeType, ModuleType
from typing import Any

_MOVED = {
    "sampimp.capture": {
        "sampimp.importance.buffer": "NormBuffer",
        "sampimp.importance.recorder": "ImportanceRecorder",
        "sampimp.importance.sample_index": "Index check_index split_passes sum_by_sample",
        "sampimp.importance.snapshot": "forward_layers snapshot_importance",
    },
    "sampimp.factors": {
        "sampimp.importance.gradients": (
            "Explicit Factor GRAM_POSITIONS Outer Product Rows=EmbeddingRows Total in_chunks "
            "squares total"
        ),
        "sampimp.importance.per_sample": (
            "chunk=samples_at_once gram=gram_of_positions precise=at_least_float32 square_sum "
            "taken=gather_rows"
        ),
    },
    "sampimp.optimizers": {
        "sampimp.importance.optimizers": (
            "AdagradRule AdamRule RMSpropRule SGDRule derivative_rule"
        ),
        "sampimp.importance.parameter_step": "DerivativeRule ParameterStep Part Room=Workspace",
        "sampimp.importance.rules.registry": "Rule",
        "sampimp.importance.update": "Derivative Diagonal UpdateDerivative",
    },
    "sampimp.rules": {
        "sampimp.importance.rules.batch": "Batch Factors Features require_samples",
        "sampimp.importance.rules.convolution": "all_but_samples=conv_features",
        "sampimp.importance.rules.normalization": "all_but_first",
        "sampimp.importance.rules.registry": "RULES Rule feature_axes layer_rule",
    },
    "sampimp.trainers": {
        "sampimp.integrations.huggingface": "HuggingFaceImportance",
        "sampimp.integrations.lightning": "LightningImportance",
    },
    "sampimp.models": {
        "sampimp.importance.evaluation": "evaluation_mode",
        "sampimp.training.identity": "identify_network require_network",
        "sampimp.training.models": (
            "ResidualBlock RowReader=RowRNN RowTransformer build_cnn build_mlp build_model "
            "build_resnet18 flatten_parameters load_parameters parameter_layers "
            "rows_of=image_rows"
        ),
    },
    "sampimp.strategies": {
        "sampimp.training.strategies": "SORT_KEY Schedule batch_positions make_schedule",
    },
    "sampimp.training": {
        "sampimp.training.loop": "EVALUATION_CHUNK",
        "sampimp.training.steps": "Step=TrainingStep",
    },
    "sampimp.data": {
        "sampimp.data.digits": "DIGITS_TEST",
        "sampimp.data.images": (
            "IMAGE_SUFFIXES ImageList decode_image decode_images image_blocks images_source "
            "list_images"
        ),
        "sampimp.data.names": "DATASETS",
        "sampimp.data.official": "MNIST_TRAIN",
    },
    "sampimp.store": {
        "sampimp.store.attempts": "LastSign SupersededError claim_attempt last_sign",
        "sampimp.store.datasets": (
            "SOURCE_ARRAYS SOURCE_CHUNK StoredSource chunk_table open_source read_source "
            "write_source"
        ),
        "sampimp.store.commits": "withdraw",
        "sampimp.store.integrity": "chunk_digests find_damage record_digest",
        "sampimp.store.record": "History KEPT_CHECKPOINTS TrialRecord",
        "sampimp.store.snapshots": "SNAPSHOTS stored_snapshots write_snapshot",
        "sampimp.store.variables": "StoredVariable read_difficulty",
        "sampimp.store.zarr_arrays": "open_array open_for_writing",
    },
    "sampimp.folder": {
        "sampimp.store.buckets": (
            "FIRST_PATIENCE=OPENING_PATIENCE PATIENCE=SERVER_PATIENCE TIMEOUT=REQUEST_TIMEOUT "
            "local_root open_store"
        ),
        "sampimp.store.links": "check_links",
        "sampimp.store.location": "Folder",
        "sampimp.store.s3_errors": "ServerAwayError reaching=readable_errors",
    },
    "sampimp.plan": {
        "sampimp.store.plan": "DatasetInfo Plan PlannedTrial read_commits",
        "sampimp.store.plan_files": "read_plan require_plan",
    },
    "sampimp.cube": {
        "sampimp.store.cube": "open_cube",
    },
    "sampimp.consolidate": {
        "sampimp.store.sharded": (
            "BLOCK_BYTES=WRITE_BLOCK_BYTES CHUNK_BYTES Consolidated SHARD_BYTES UNFINISHED "
            "blocks chunk_and_shard consolidate"
        ),
    },
    "sampimp.workers": {
        "sampimp.training.collective": (
            "ALONE=SINGLE_PROCESS TIMEOUT=PEER_TIMEOUT TorchWorkers=TorchProcessGroup "
            "Workers=ProcessGroup"
        ),
    },
    "sampimp.fused": {
        "sampimp.training.fused": "FusedStep aten loss_gradient",
    },
    "sampimp.convolution": {
        "sampimp.importance.rules.convolution": "ADDITION Convolution Window",
    },
    "sampimp.recurrent": {
        "sampimp.importance.rules.recurrent_backward": (
            "CELLS Cell GruCell LstmCell Run=LayerRun SimpleCell Slopes State"
        ),
        "sampimp.importance.rules.recurrent_call": (
            "Call=RecurrentCall Weights=LayerWeights is_batch_first packed_sequences"
        ),
    },
    "sampimp.analysis.study": {
        "sampimp.analysis.results.analyse": "RESULTS Result analyse compute_together",
    },
    "sampimp.analysis.stability": {
        "sampimp.analysis.results.stability": "stability",
    },
    "sampimp.analysis.decomposition": {
        "sampimp.analysis.results.decomposition": (
            "BINS FOLDS GROUPS QUANTILES=HISTOGRAM_QUANTILES decomposition folds_of "
            "importance_groups importance_histogram"
        ),
    },
    "sampimp.analysis.difficulty": {
        "sampimp.analysis.results.difficulty": "DIFFICULTIES importance_against_nll",
    },
    "sampimp.analysis.clusters": {
        "sampimp.analysis.results.clusters": (
            "PAPER_CLASSES QUANTILES=BOX_QUANTILES REPRESENTATIVES SAMPLES_PER_CLUSTER "
            "cluster_count clusters default_class normalise_profiles"
        ),
    },
    "sampimp.analysis.curves": {
        "sampimp.analysis.results.curves": "strategy_curves",
    },
    "sampimp.analysis.paths": {
        "sampimp.analysis.results.paths": "BLOCK_BYTES=STATE_BLOCK_BYTES parameter_paths",
    },
    "sampimp.analysis.claims": {
        "sampimp.analysis.claims.evidence": "Claim Estimate Evidence UNKNOWN=NO_ESTIMATE third",
        "sampimp.analysis.claims.judge": "VERDICTS claims=judge_claims",
        "sampimp.analysis.claims.section_3_6": "MIXED SORTED",
        "sampimp.analysis.claims.table": "CLAIMS MARGIN",
    },
    "sampimp.analysis.figures": {
        "sampimp.analysis.figures.reference_runs": "MOST_POINTS",
        "sampimp.analysis.figures.style": (
            "IMPORTANCE=IMPORTANCE_UNIT MOST_CLASSES MOST_LINES STYLE=RC_PARAMS Style WIDTH"
        ),
    },
    "sampimp.analysis.report": {
        "sampimp.analysis.report.contents": (
            "Drawn StrategyRow VERDICTS=VERDICT_MARKS describe_runs strategy_rows"
        ),
        "sampimp.analysis.report.drawing": "FIGURES Plan=FigurePlan draw_figures",
        "sampimp.analysis.report.terminal": "summary_table",
        "sampimp.analysis.report.trial_facts": "PER_TRIAL=PER_TRIAL_KEYS",
        "sampimp.analysis.report.write": "find_cubes",
        "sampimp.analysis.runs": "PAPER",
    },
}
"""By old module: the names in each new module, as `old=new` if the name has changed."""


_PUBLIC = {
    *("HuggingFaceImportance", "ImportanceRecorder", "LightningImportance", "derivative_rule"),
    *("layer_rule", "open_cube", "snapshot_importance"),
}
"""Names whose new path is `sampimp` itself."""


def _new_paths(old: str) -> dict[str, str]:
    """Return the new path of each name of an old module."""
    paths = {}
    for module, names in _MOVED.get(old, {}).items():
        for name in names.split():
            before, _, after = name.partition("=")
            is_public = before in _PUBLIC
            paths[before] = f"{'sampimp' if is_public else module}.{after or before}"
    return paths


MOVED: Mapping[str, Mapping[str, str]] = {old: _new_paths(old) for old in _MOVED}
"""By old module: the new path of each name."""


def _warn(old: str, new: str, stacklevel: int) -> None:
    warnings.warn(
        f"{old} is now {new}; the old path will be removed in the next release",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )


def moved(old: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose names have moved.

    Parameters
    ----------
    old
        Name of the module; where it is no key of `MOVED`, every name is an error.
    """

    def get(name: str) -> Any:
        new = MOVED.get(old, {}).get(name)
        if new is None:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        _warn(f"{old}.{name}", new, stacklevel=2)
        module, _, attribute = new.rpartition(".")
        return getattr(import_module(module), attribute)

    return get


class _MovedFinder(MetaPathFinder, Loader):
    """Finds the modules of `MOVED` that no longer exist."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # an empty module

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "Deprecated: its names have moved."
        module.__getattr__ = moved(module.__name__)  # type: ignore[method-assign]


sys.meta_path.append(_MovedFinder())


def alias_package(old: str, new: str) -> None:
    """Make `import old.module` return the module `new.module`."""
    sys.meta_path.insert(0, _AliasFinder(old, new))
    sys.modules[old] = import_module(new)


class _AliasFinder(MetaPathFinder):
    """Finds `old.module` as `new.module`."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{self.old}."):
            return None
        spec = find_spec(self.new + fullname.removeprefix(self.old))
        if spec is None:
            return None
        is_package = spec.submodule_search_locations is not None
        return spec_from_loader(fullname, _AliasLoader(spec), is_package=is_package)


class _AliasLoader(Loader):
    """Returns the module of the new name; `python -m` calls `get_code` instead."""

    def __init__(self, spec: ModuleSpec) -> None:
        self.spec = spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        # `python -m analysis.report` stays; a module that has moved on has warnings of its own.
        if sys.argv[:1] != ["-m"] and self.spec.name not in MOVED:
            _warn(spec.name, self.spec.name, stacklevel=2)
        return import_module(self.spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # importlib put the alias's in its place

    def get_code(self, fullname: str) -> CodeType | None:
        assert self.spec.loader is not None
        return self.spec.loader.get_code(self.spec.name)  # type: ignore[attr-defined]
