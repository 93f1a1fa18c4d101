# Everything is installed into .venv, in the versions of constraints.txt.
#   make PYTHON=python3.12 demo     with another Python than python3

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -qq install --constraint constraints.txt
# DeepSpeed compiles its CPU op with the ninja it finds on the path, and keeps it where torch's extensions are: in this
# environment, because the op of another one would be built over it.
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" TORCH_EXTENSIONS_DIR="$(CURDIR)/$(VENV)/torch_extensions"

.PHONY: help demo test clean

help:
	@echo "make demo    the whole path in small: shards, ZeRO pretraining, export, fine-tuning (minutes)"
	@echo "make test    lint, types, architecture contracts and all tests"
	@echo "make clean   remove .venv, the demo's runs, caches and build leftovers"

demo: $(VENV)/.installed-demo $(VENV)/.built-collective
	@$(IN_VENV) python launch/demo.py

# More processes than CI's two cores: a good part of the tests is waiting, for Slurm and for limits to pass.
test: $(VENV)/.installed-test $(VENV)/.built-collective
	$(IN_VENV) ruff check
	$(IN_VENV) ruff format --check
	$(IN_VENV) mypy
	$(IN_VENV) lint-imports
	$(IN_VENV) pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) runs/demo build *.egg-info .hypothesis .*_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The demo's and the tests' extras rest on the same torch and DeepSpeed. DeepSpeed is built against the torch
# that is there, so torch comes first and no build is isolated from it.
$(VENV)/.installed-%: $(VENV)/.installed-deepspeed pyproject.toml
	@echo "installing vitscale and what its $* needs"
	@$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

$(VENV)/.installed-deepspeed: $(VENV)/.installed-torch
	@echo "installing DeepSpeed"
	@$(PIP) --no-build-isolation deepspeed
	@touch $@

# Needs DeepSpeed alone: with `make --jobs=2` it is compiled while the rest is installed.
$(VENV)/.built-collective: $(VENV)/.installed-deepspeed
	@rm -rf $(VENV)/torch_extensions  # with the lock of a build that was cut off
	@$(VENV)/bin/python -c "import sys, torch; sys.exit(torch.cuda.is_available())" || exit 0; \
	echo "compiling DeepSpeed's collective for CPUs (a minute)"; \
	$(IN_VENV) DS_ACCELERATOR=cpu python -c "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; \
	ShareMemCommBuilder().load(verbose=False)" >/dev/null 2>&1 || \
	{ echo "it failed: is a C++ compiler with Python's headers there? (Debian: apt-get install g++ python3-dev)" >&2; exit 1; }
	@touch $@

$(VENV)/.installed-torch: $(VENV)/.created constraints.txt
	@echo "installing torch (some gigabytes, the longest part)"
	@$(PIP) torch torchvision numpy setuptools wheel ninja
	@$(VENV)/bin/python -c "import torch; \
	build = 'CUDA' if torch.version.cuda else 'ROCm' if torch.version.hip else 'CPU'; \
	gpus = torch.cuda.device_count(); \
	print(f'torch {torch.__version__}, {build} build,', f'GPUs: {gpus}' if gpus else 'no GPU here: CPU')"
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || \
	{ echo "$(PYTHON) is not Python 3.11 or newer: install one, then make PYTHON=/its/path" >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
	{ echo "$(PYTHON) cannot make environments with pip: install its venv package (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@
