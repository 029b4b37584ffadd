# make demo | test | test-slow | test-slurm | lint: each sets up .venv first, and only when the pinned set has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := runs/demo

.PHONY: demo test test-slow test-slurm lint setup

setup: $(STAMP)

# torch comes first and alone: what the others ask for is then satisfied by the pinned build.
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python train.py --config conf/mini/supervised_street.yaml --output $(DEMO) --overwrite
	$(BIN)/python test.py $(DEMO)
	$(BIN)/python -m scripts.curves $(DEMO)
	$(BIN)/python -m scripts.demo_images --output $(DEMO)/images
	$(BIN)/python predict.py $(DEMO) --input $(DEMO)/images --output $(DEMO)/predictions
	@echo && cat $(DEMO)/test/own-best/metrics.md
	@echo && echo "Pictures:"
	@ls $(DEMO)/pictures/curves.png $(DEMO)/test/own-best/pictures/confusion-*.png $(DEMO)/predictions/*overlay.png
	@echo "and more in $(DEMO)/pictures, $(DEMO)/test/own-best/pictures and $(DEMO)/predictions (legend.png)"

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 -m "not slow and not cuda and not slurm"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not cuda"

# As root on Debian: installs SLURM where it is missing, starts two nodes on this machine, and stops them.
test-slurm: $(STAMP)
	$(BIN)/python -m pytest -o faulthandler_timeout=0 -m slurm tests/slurm

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
