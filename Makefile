# make demo   install, fine-tune the small model on the digits, evaluate what it wrote
# make test   install, run the tests (CPU, no network), three at a time on two processors (tests/conftest.py)
# make lint   style and types
# make soak   the tests that take long; make errors writes docs/errors.md from its tests
# make flags  writes docs/flags.md from the table in utils/args.py
#
# VENV=... takes another virtual environment, PYTHON=... another interpreter to make it with.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

DEMO := --name demo --dataset digits --model_type ViT-demo --img_size 32
DEMO_TRAINING := --resume none --train_batch_size 64 --num_steps 1200 --warmup_steps 60 --learning_rate 0.05 --eval_every 400

.PHONY: demo test lint format test-gpu soak errors flags clean

$(VENV)/installed: requirements.txt
	$(PY) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the packages; PyTorch takes a while"
	$(PIP) install -q -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(PIP) install -q -r requirements-dev.txt
	touch $@

demo: $(VENV)/installed
	$(PY) train.py $(DEMO) $(DEMO_TRAINING) --pretrained_dir checkpoint/ViT-demo.npz
	$(PY) train.py $(DEMO) -v

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal -m "not gpu and not soak"

test-gpu: $(VENV)/installed-dev
	$(PY) -m pytest -m gpu

errors: $(VENV)/installed-dev
	$(PY) -m pytest tests/test_errors.py --write_errors

flags: $(VENV)/installed
	$(PY) -c "from pathlib import Path; from utils import args; Path('docs/flags.md').write_text(args.flags_page())"

soak: $(VENV)/installed-dev
	$(PY) -m pytest -m soak

lint: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
