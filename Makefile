# `make` lists the targets: each has one sentence beside its name.
#
# torch is pinned. Without an NVIDIA GPU the CPU build is asked for first, because PyPI's Linux
# build brings gigabytes of CUDA; that build has no Triton, whose interpreter and compiler the tests
# use.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,triton==3.6.0)
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,--retries 1 --extra-index-url https://download.pytorch.org/whl/cpu)
BIN := .venv/bin

# Where it is set, each of the many processes that tests start compiles every file again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test pytest lint emulate gpu compile-every-triton docs dist venv clean

help:  ## Lists the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-22s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: venv  ## Trains a V-MoE and a dense ViT, attacks both and writes a report, in minutes.
	$(BIN)/ironmoe demo

# mypy has one thread and takes as long as many tests, so it runs beside them.
test: venv  ## Runs ruff, mypy and all tests that need no GPU.
	@$(MAKE) --no-print-directory --jobs 2 lint pytest

# A process for each core, one thread in each: more threads would only wait for each other. A
# process gets whole files where it can, so that what a file prepares once is not prepared in every
# process, and takes from another one when it has nothing left.
pytest: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

# docs/kernels.md says what it shows. Some of the tests: make emulate EMULATE_OPTIONS='-k swiglu'
emulate: venv  ## Runs the kernel tests on compiled code for sm_80 and sm_90, without a GPU.
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 TRITON_CACHE_DIR="$(CURDIR)/build/emulate" \
	PYTHONPATH=tests/emulator:tests/support $(BIN)/python -m pytest -p plugin \
	-p no:cacheprovider --numprocesses 2 --dist worksteal \
	tests/emulator/production.py tests/kernels/gpu $(EMULATE_OPTIONS)

# Needs PYTHON to have torch, Triton and pytest, but no venv and no network: the packages are found
# through links in a folder that goes away again. Options: make gpu GPU_OPTIONS='--tune --minutes 5'
gpu:  ## Tests and measures on a GPU, in nine minutes, and writes bench/results.
	@links=$$(mktemp -d) && trap 'rm -rf "$$links"' EXIT && mkdir "$$links/ironmoe" && \
	for floor in kernels moe attacks bench; do ln -s "$(CURDIR)/$$floor" "$$links/ironmoe/$$floor"; done && \
	PYTHONPATH="$$links$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m ironmoe.bench.benchmarks.gpu $(GPU_OPTIONS)

# Before a release: every kernel at every width. Each Triton goes into a folder of its own in front
# of the environment's, which keeps its pinned one. No GPU is needed; it takes hours on two cores.
TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
compile-every-triton: venv  ## Compiles every kernel under each Triton that pyproject.toml allows.
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && failed= && for version in $(TRITONS); do \
	  echo "Triton $$version" && \
	  $(BIN)/python -m pip install --quiet --no-deps --target "$$folder/triton" "triton==$$version" && \
	  PYTHONPATH="$$folder/triton$${PYTHONPATH:+:$$PYTHONPATH}" TRITON_CACHE_DIR="$$folder/cache" \
	    $(BIN)/ironmoe doctor --compile $(COMPILE_OPTIONS) || failed="$$failed $$version"; \
	  rm -rf "$$folder/triton" "$$folder/cache"; \
	done; if [ -n "$$failed" ]; then echo "faults under Triton$$failed"; exit 1; fi

# The wheel is built from the sdist, so both are complete if it runs. It runs in a folder and with
# packages that have nothing of this checkout.
dist: venv  ## Builds sdist and wheel into dist, and tries the wheel in a fresh environment.
	rm -rf dist
	$(BIN)/python -m build --quiet --no-isolation .
	@unset PYTHONPATH && wheel=$$(ls "$(CURDIR)"/dist/*.whl) && folder=$$(mktemp -d) && \
	trap 'rm -rf "$$folder"' EXIT && cd "$$folder" && $(PYTHON) -m venv .venv && \
	.venv/bin/python -m pip install --quiet $(TORCH_INDEX) '$(TORCH)' "$$wheel[bench]" && \
	PATH="$$folder/.venv/bin:$$PATH" && set -x && ironmoe --version && ironmoe doctor && \
	ironmoe demo --data digits --epochs 2 --eps 8 --steps 5 --attack-images 50 --out demo && \
	ironmoe attack demo/checkpoints/v-moe-seed0.safetensors --data digits --eps 8 --steps 5 && \
	ironmoe bench roofline

venv: .venv/installed  ## Makes the environment .venv, where it is not up to date.

lint: venv  ## Runs ruff and mypy.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The folders are prerequisites because a strict editable install has to be made again when a file
# appears or goes.
.venv/installed: pyproject.toml $(shell find kernels moe attacks bench -type d ! -name __pycache__)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH_INDEX) '$(TORCH)' $(TRITON) 'numpy<2.4'
	$(BIN)/python -m pip install --quiet --editable '.[bench,dev]' --config-settings editable_mode=strict
	touch $@

# The pages lie in the site as they lie here, so that a link is right in both. A warning is an error
# (not under --quiet, which hides it from the count), and so is a page that loads something from
# elsewhere, a reference page with fields that are no list (docs/field_lists.py), or a public name
# that the reference lacks (docs/missing_names.py).
docs: venv  ## Builds the site of the documentation in build/docs, and checks its links.
	rm -rf build/docs build/docs-tree
	mkdir -p build/docs-tree/pages/bench build/docs-tree/ironmoe
	cp -R README.md CONTRIBUTING.md CHANGELOG.md CITATION.cff LICENSE docs build/docs-tree/pages
	cp -R bench/results build/docs-tree/pages/bench
	for floor in kernels moe attacks bench; do ln -s "$(CURDIR)/$$floor" build/docs-tree/ironmoe/; done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml
	! grep -rnoE '<(script|link|img)[^>]* (src|href)="?https?:[^ >]*' --include='*.html' build/docs
	! grep -rnE '<details|class="admonition|^<p>[a-z_]+(, [a-z_]+)*: ' build/docs/docs/reference
	$(BIN)/python docs/missing_names.py build/docs
	@echo "build/docs/index.html; to search: $(BIN)/python -m http.server --directory build/docs"

clean:  ## Removes the environment and everything that was built.
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
