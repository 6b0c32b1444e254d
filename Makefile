# make setup | test [PROCESSES=3] | test-apiserver | lint | demo | chaos [MINUTES=3] [SEED=1] | bench [NAME=recovery] | clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
NAME ?= recovery
MINUTES ?= 3
SEED ?= 1
EXTRAS ?= dev
PROCESSES ?= 3
APISERVER ?= $(HOME)/.cache/reknit/apiserver
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Some containers set it: then each of a run's processes compiles all that it imports for itself.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup lint test units test-apiserver demo chaos bench clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# Stamped, so that it is instant until the dependencies change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Types are checked beside the tests, so that neither of two cores stands idle.
test: setup
	@$(MAKE) --no-print-directory --jobs=2 lint units

# More processes than two cores have: tests on Ray wait for something a sixth of their time.
units: setup
	$(BIN)/pytest -q -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

# Autoscaling against a real kube-apiserver and etcd, which are built of Debian's sources once (Debian 12).
test-apiserver: setup
	tests/support/kubernetes/build_apiserver.sh "$(APISERVER)"
	$(BIN)/pytest -q tests/k8s/test_autoscaling.py --apiserver="$(APISERVER)/bin"

# A fresh run folder each time: a run is never written over.
demo: setup
	@folder=runs/demo-$$(date +%Y%m%d-%H%M%S)-$$$$ && \
	$(BIN)/reknit train jobs/recipes/demo.toml --run-folder "$$folder" && \
	$(BIN)/reknit verify "$$folder"

# Kills and adds workers, nodes and controllers of a run, and compares every bit.
chaos: setup
	$(BIN)/reknit chaos jobs/recipes/chaos.toml --minutes $(MINUTES) --seed $(SEED)

bench: setup
	$(BIN)/reknit bench $(NAME)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
