# Everything a user or contributor runs. `make demo` and `make test` each do all set-up by themselves, in .venv, once.
# Needed beforehand: Python 3.11 or newer, a C++ compiler, make.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTED := $(VENV)/.tested
FLASH := .venv-flash
FLASH_READY := $(FLASH)/.ready
FLASH_TESTS := tests/test_flash_attention.py tests/test_fused_kernels.py
SOURCES := $(shell find uvlm data_pipeline tests benchmarks ds_configs slurm -type f -not -name '*.pyc' 2>/dev/null)
# What `make test` leaves out: long tests and those that need something installed. `make test-all` runs these too.
EXTRA := slow or slurm or flash

# ninja and the other tools of the environment; a later pytest or `uvlm` started by a test finds the same ones.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-flash lint bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18

demo: $(READY) ## data to trained model to pictures on this machine, nothing to configure
	$(BIN)/uvlm demo

test: $(READY) ## lint, types and the fast tests
	@rm -f $(TESTED)
	@$(MAKE) --no-print-directory $(TESTED)

test-all: $(TESTED) ## the fast tests unless they passed on these very files, then the slow, slurm and flash ones
	$(BIN)/python -m pytest -m "$(EXTRA)"

test-flash: $(READY) ## the real flash-attn package: on a GPU, else on the CPU under Triton's interpreter
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m pytest $(FLASH_TESTS); \
	else \
	  $(MAKE) --no-print-directory $(FLASH_READY) && \
	  TRITON_INTERPRET=1 FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE $(FLASH)/bin/python -m pytest $(FLASH_TESTS); \
	fi

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## run every benchmark; each file is one claim
	@set -e; for file in benchmarks/[a-z]*.py; do \
	  [ -e "$$file" ] || { echo "there are no benchmarks yet"; break; }; \
	  echo "== $$file"; $(BIN)/python "$$file"; \
	done

clean: ## remove the environment and all caches; runs and data stay
	rm -rf $(VENV) $(FLASH) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The fast tests passed on the files as they are now.
$(TESTED): $(READY) $(SOURCES)
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -m "not ($(EXTRA))"
	@touch $@

# Set-up. The stamp comes last, so an interrupted set-up is taken up again; pip skips what is there already.
# torch has a step of its own: its version is fixed before anything else can ask for a newer or larger build.
$(READY): pyproject.toml constraints.txt
	@python=; for name in python3.11 python3.12 python3.13 python3; do \
	  if $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python=$$name; break; fi; done; \
	[ -n "$$python" ] || { echo "uvlm needs Python 3.11 or newer with its venv module; none of python3.11," \
	  "python3.12, python3.13, python3 is that. On Debian: apt-get install python3-venv" >&2; exit 1; }; \
	command -v c++ >/dev/null || { echo "uvlm needs a C++ compiler named c++ (DeepSpeed compiles a small operator" \
	  "at its first start). On Debian: apt-get install g++" >&2; exit 1; }; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "== creating $(VENV) with $$python"; \
	  rm -rf $(VENV); $$python -m venv $(VENV); }
	@echo "== installing torch (the largest part, about 200 MB in its CPU build)"
	$(BIN)/python -m pip install --quiet -c constraints.txt $(shell grep -E '^torch==' constraints.txt)
	@echo "== installing uvlm and what it needs, at the versions of constraints.txt"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,test]'
	@touch $@

# A second environment for flash-attn on a CPU, as Triton's interpreter needs an older NumPy than the rest. It holds the
# packages of constraints-flash.txt; a .pth line puts those of .venv behind them, so torch is not installed twice.
# flash-attn is built as pure Python. Such a wheel must not enter pip's cache: an install for a GPU would find it there.
$(FLASH_READY): $(READY) constraints-flash.txt
	@echo "== creating $(FLASH): flash-attn without CUDA, Triton (170 MB) and an older NumPy"
	$(BIN)/python -m venv --clear $(FLASH)
	$(FLASH)/bin/python -m pip install --quiet --no-deps -c constraints-flash.txt numpy triton wheel
	@packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(BIN)/python -c "$$packages" >"$$($(FLASH)/bin/python -c "$$packages")/main.pth"
	FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE \
	  $(FLASH)/bin/python -m pip install --quiet --no-cache-dir --no-deps --no-build-isolation \
	  -c constraints-flash.txt flash-attn
	$(FLASH)/bin/python -m pip install --quiet --no-deps -c constraints-flash.txt liger-kernel
	@touch $@
