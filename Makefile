# Every target sets up its environment first: a machine needs Python >= 3.11, make and pip's way to a package index.
# `make test PYTHON=python3.12` uses another interpreter, in a separate environment.

PYTHON ?= python3
VENV ?= .venv$(addprefix -,$(notdir $(filter-out python3,$(PYTHON))))
RUN := $(VENV)/bin/python
LIBERO := .venv-libero
LIBERO_PYTHON ?= python3.11
PYTEST_ARGS ?= -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: help demo demo-finetune demo-chunks libero-env test test-long bench lint clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' Makefile

demo: export JAX_PLATFORMS ?= cpu
demo: $(VENV)/demo.stamp ## write the tabletop task's episodes, train a tiny OpenVLA on them, evaluate it (runs/demo)
	$(RUN) -m openvla_jax.sim.dataset --out runs/demo/data
	$(RUN) train.py --config configs/tabletop.py --workdir runs/demo
	$(RUN) -m openvla_jax.evaluate rollout --checkpoint runs/demo --controls --out runs/demo/report

demo-finetune: export JAX_PLATFORMS ?= cpu
demo-finetune: $(VENV)/demo.stamp ## 25 demonstrations in a world that the demo's policy never saw: LoRA, full, from scratch
	@test -d runs/demo/checkpoints/4000 || $(MAKE) demo
	$(RUN) -m openvla_jax.sim.dataset --world changed --episodes 25 --out runs/demo-finetune/data
	$(RUN) finetune.py --config configs/finetune/tabletop.py:lora --config.init_from=runs/demo --workdir runs/demo-finetune/lora
	$(RUN) finetune.py --config configs/finetune/tabletop.py:full --config.init_from=runs/demo --workdir runs/demo-finetune/full
	$(RUN) train.py --config configs/finetune/tabletop.py:scratch --workdir runs/demo-finetune/scratch
	$(RUN) -m openvla_jax.evaluate compare before=runs/demo scratch=runs/demo-finetune/scratch full=runs/demo-finetune/full \
	    lora=runs/demo-finetune/lora --world changed --first_seed 10000 --out runs/demo-finetune/report

demo-chunks: export JAX_PLATFORMS ?= cpu
demo-chunks: $(VENV)/demo.stamp ## two cameras and a state: eight actions in one forward pass beside one, token by token
	$(RUN) -m openvla_jax.sim.dataset --world wrist --out runs/demo-chunks/data
	$(RUN) train.py --config configs/tabletop_oft.py:tokens --workdir runs/demo-chunks/tokens
	$(RUN) train.py --config configs/tabletop_oft.py:l1 --workdir runs/demo-chunks/l1
	$(RUN) -m openvla_jax.evaluate compare tokens=runs/demo-chunks/tokens l1=runs/demo-chunks/l1 --world wrist --controls --pace \
	    --out runs/demo-chunks/report

libero-env: $(LIBERO)/libero.stamp ## LIBERO's simulator, in an environment of its own (Python 3.11, 2 GB)

test: $(VENV)/dev.stamp ## the tests, on the CPU (PYTEST_ARGS=... replaces the options)
	JAX_PLATFORMS=cpu $(RUN) -m pytest -m "not long" $(PYTEST_ARGS)

test-long: $(VENV)/dev.stamp ## the others: runs of several processes, whole commands, exhaustive comparisons
	JAX_PLATFORMS=cpu $(RUN) -m pytest -m long $(PYTEST_ARGS)

bench: $(VENV)/dev.stamp ## every benchmark in benchmarks/, one after another
	@set -e; for file in $(sort $(wildcard benchmarks/*.py)); do echo "== $$file"; $(RUN) $$file; done

lint: $(VENV)/dev.stamp ## style, formatting and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean: ## remove environments, caches and the demo's output
	rm -rf .venv .venv-* .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/demo runs/demo-finetune runs/demo-chunks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments: a stamp is written only after its whole installation, so what was cut short is done again ---

$(VENV)/venv.stamp:
	@py='$(PYTHON)'; \
	"$$py" -c pass 2>/dev/null || \
	    py=$$(ls "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin/$(PYTHON) 2>/dev/null | tail -n 1); \
	fail() { echo "error: $$*" >&2; exit 1; }; \
	[ -n "$$py" ] || fail "PYTHON=$(PYTHON) does not run; install it or name another: make test PYTHON=/path/to/python"; \
	"$$py" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    fail "$$py is $$("$$py" -V 2>&1); openvla_jax needs Python >= 3.11: make test PYTHON=python3.11"; \
	"$$py" -c 'import ensurepip, venv' 2>/dev/null || \
	    fail "$$py cannot make environments; install its venv package (Debian, Ubuntu: apt install python3-venv)"; \
	"$$py" -m venv --clear $(VENV) && touch $@

# Compiling every installed file to bytecode takes half a minute, for files that are mostly never imported: it is left to
# the first import, which must then be free to write what it compiled.
export PYTHONDONTWRITEBYTECODE :=

# What make demo needs, and (dev) what tests and checks need besides: PyTorch, which is large.
$(VENV)/demo.stamp: extras := data,plots
$(VENV)/dev.stamp: extras := dev
$(VENV)/demo.stamp $(VENV)/dev.stamp: $(VENV)/venv.stamp setup.py constraints.txt
	@echo "installing openvla_jax[$(extras)] into $(VENV) (minutes, the first time)"
	@$(RUN) -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[$(extras)]'
	@touch $(VENV)/demo.stamp $@

# Other versions than these draw other pixels. The simulator draws in software, for which pip has no package.
LIBERO_PINS := openvla_jax/sim/libero/requirements.txt
$(LIBERO)/libero.stamp: $(LIBERO_PINS)
	@py='$(LIBERO_PYTHON)'; \
	"$$py" -c pass 2>/dev/null || \
	    py=$$(ls "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.11*/bin/python3.11 2>/dev/null | tail -n 1); \
	fail() { echo "error: $$*" >&2; exit 1; }; \
	[ -n "$$py" ] && "$$py" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	    fail "LIBERO's simulator needs Python 3.11: install it, or make libero-env LIBERO_PYTHON=/path/to/python3.11"; \
	"$$py" -c 'import ctypes; ctypes.CDLL("libOSMesa.so.8")' 2>/dev/null || \
	    fail "libOSMesa.so.8 is missing, which draws LIBERO's images: apt install libosmesa6"; \
	echo "installing LIBERO into $(LIBERO) (2 GB, minutes)"; \
	rm -f $@ && "$$py" -m venv --clear $(LIBERO)
	@$(LIBERO)/bin/python -m pip install -q --no-compile --disable-pip-version-check --require-hashes -r $(LIBERO_PINS)
	@touch $@
