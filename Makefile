# The commands of the project; `make` lists them. They require Python 3.11 or newer and make.
#
# All use one environment, .venv, with one stamp file per set of extras: a target whose stamp is newer
# than pyproject.toml and constraints.txt starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
FIRST := about 1 GB (more where PyTorch comes with CUDA), 1 to 5 minutes the first time
comma := ,
PINS := pyproject.toml constraints.txt

# $(call install,extras,what,how long): the stamp is touched last, so that an interrupted install is
# repeated.
define install
@echo "Installing $(2) into $(VENV): $(3) ..."
@$(PIP_INSTALL) -e '.$(1)'
@touch $@
endef

.PHONY: help study test check docs recipes bench influence power chaos drivers fuzz faults soak cluster-test gpu gpu-wheels clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# With make -j, two concurrent installs would break the environment.
.NOTPARALLEL:

help:
	@echo "make study   the whole study on scikit-learn's digits, into results/digits (minutes)"
	@echo "make test    the tests"
	@echo "make check   format, lint, types, doctests, tests"
	@echo "make docs    the documentation, into docs/_build/html; warnings are errors"
	@echo "make recipes the recipes for other tools of docs/tools.md, in .venv-recipes (2 GB)"
	@echo "make power   a study whose power is cut 200 times, against an undisturbed one (minutes)"
	@echo "make chaos   a study with injected deaths and faults, against an undisturbed one (minutes)"
	@echo "make drivers four drivers of one study, started, killed and restarted: DRIVERS_OPTIONS='--seeds 10' (minutes)"
	@echo "make fuzz    10,000 changed files of a study: readers raise named errors only (an hour)"
	@echo "make faults  every operation of the store fails once, on a disk and on S3 (an hour and a half)"
	@echo "make soak    studies and readers on an S3 server with faults: memory must be flat (half an hour)"
	@echo "make explore-bench   50,000 samples in the explorer: from lasso to paint, in a browser on one core (minutes)"
	@echo "make cluster-test   ray up on hosts in namespaces: one loses its network, one dies (root; 4 minutes)"
	@echo "make bench   training steps with and without recording, against BackPACK and Opacus"
	@echo "make influence   influence on the final model against retrainings, other packages, cost (3 hours)"
	@echo "make gpu-wheels   fetch wheels and MNIST for a GPU machine without a package index, into gpu-wheels/"
	@echo "make gpu     on a GPU: exactness, the cost of recording, CUDA graphs, the paper's run (8 minutes)"
	@echo "make clean   remove the environment and the caches; results/ stays"

study: $(VENV)/.installed
	@$(BIN)/python sweeps/full_study.py --preset digits --out results/digits

test: $(VENV)/.installed-test
	@tests/browser/install.sh
	@$(BIN)/python -m pytest -n 2 --dist loadscope

cluster-test: $(VENV)/.installed-test
	@tests/cluster/run.sh $(BIN)/python

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory test

docs: $(VENV)/.installed-docs
	@rm -rf docs/api/generated  # pages of modules that are gone
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# Not in $(VENV): the tools ask for other versions of what they share with the tests' environment.
RECIPES := .venv-recipes
recipes: | $(VENV)/.created
	@test -d $(RECIPES) || $(BIN)/python -m venv $(RECIPES)
	@grep -E '^(torch|xarray|zarr|numpy|pandas)==' constraints.txt > $(RECIPES)/constraints.txt
	@$(RECIPES)/bin/python -m pip install -qq --disable-pip-version-check -c $(RECIPES)/constraints.txt \
		-e . -r tests/docs/recipes.txt hypothesis pillow pyarrow pytest pytest-timeout pytest-xdist scikit-learn
	@RECIPES=all WANDB_MODE=offline $(RECIPES)/bin/python -m pytest -n0 tests/docs/test_tools.py

power: $(VENV)/.installed-test
	@$(BIN)/python tests/store/power_loss.py

explore-bench: $(VENV)/.installed-test
	@tests/browser/install.sh
	@$(BIN)/python benchmarks/explore.py

chaos: $(VENV)/.installed-test
	@$(BIN)/python tests/chaos/chaos.py

drivers: $(VENV)/.installed-test
	@$(BIN)/python tests/chaos/drivers.py $(DRIVERS_OPTIONS)

fuzz: $(VENV)/.installed-test
	@PYTHONPATH=tests/helpers $(BIN)/python tests/fuzz/fuzz.py $(FUZZ_OPTIONS)

faults: $(VENV)/.installed-test
	@FAULTS_EVERY=1 $(BIN)/python -m pytest -n 2 --timeout=0 tests/faults

soak: $(VENV)/.installed-test
	@$(BIN)/python tests/soak/soak.py --minutes 30

bench: $(VENV)/.installed-bench
	@for threads in 1 $$(nproc); do \
		$(BIN)/python benchmarks/step.py --threads $$threads --out benchmarks/step-$$threads.md && \
		$(BIN)/python benchmarks/models.py --threads $$threads --out benchmarks/models-$$threads.md \
		|| exit 1; done

influence: $(VENV)/.installed-bench
	@$(BIN)/python benchmarks/influence.py $(INFLUENCE_OPTIONS)

gpu-wheels: $(VENV)/.installed-test
	@$(BIN)/python benchmarks/gpu_wheels.py

# Not in $(VENV): a GPU machine has a PyTorch of its own, and perhaps no package index.
gpu:
	@site=$$(mktemp -d) && trap 'rm -rf "$$site"' EXIT && \
	if ls gpu-wheels/*.whl >/dev/null 2>&1; then \
		$(PYTHON) -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile \
			--target "$$site" gpu-wheels/*.whl || echo "Going on with this machine's own packages."; fi; \
	if [ -d gpu-wheels/mnist ]; then export SAMPIMP_DATA="$${SAMPIMP_DATA:-gpu-wheels}"; fi; \
	PYTHONPATH="$$site:$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) benchmarks/gpu.py $(GPU_OPTIONS)

clean:
	rm -rf $(VENV) $(RECIPES) docs/_build docs/gallery docs/api/generated .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is touched once pip is installed; `venv` repairs an environment that was interrupted.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Expected Python 3.11 or newer, got " + sys.version.split()[0] + "; name another one: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(PINS) | $(VENV)/.created
	$(call install,[study$(comma)report],sampimp,$(FIRST))

$(VENV)/.installed-test: $(PINS) | $(VENV)/.created
	$(call install,[test],sampimp and its tests' tools,$(FIRST))
	@touch $(VENV)/.installed

$(VENV)/.installed-dev: $(PINS) | $(VENV)/.created
	$(call install,[test$(comma)docs$(comma)dev],sampimp and its developers' tools,$(FIRST))
	@touch $(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-docs

$(VENV)/.installed-docs: $(PINS) | $(VENV)/.created
	$(call install,[docs],sampimp and its documentation's tools,$(FIRST))

# BackPACK requires torchvision without needing it. Beside a CPU build of PyTorch torchvision fails to
# import, and then Lightning and transformers do too.
$(VENV)/.installed-bench: $(PINS) | $(VENV)/.created
	$(call install,[bench],sampimp with the tools it is compared with,$(FIRST))
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || $(BIN)/python -m pip uninstall -qq -y torchvision
