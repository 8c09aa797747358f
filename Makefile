# make demo            set up and run the main job
# make test            set up and pass the tests
# make test-full       what make test leaves out: most cells of large grids, and what is marked full
# make test-faults     an error at every line that changes a cache: 10 to 20 minutes on two cores; KEEP=10 tries every tenth point
# make test-real       a real language model of 135M parameters: exact as stock, sparse answers kept; and quantised weights; fetches 250 MB
# make test-ray        batches on a local Ray cluster of two workers, one of which is killed; fetches 80 MB
# make test-upstream   transformers' own generation tests on patched models, token by token and logit by logit as unpatched
# make test-compiled   every launch of the GPU tests and of large models' shapes, compiled without a GPU by two Tritons; machine code within budgets; fetches 200 MB
# make test-versions   what depends on transformers, on the oldest and an older one, each in an environment of its own
# make lint            ruff: rules and format; mypy: types of scout_hf and patches
# make docs            the pages of docs/ as a site; a broken link fails

PYTHON ?= python3
VENV ?= .venv
# This release has a CPU build where only PyPI is at hand; set TORCH for another one, such as a CUDA build.
TORCH ?= torch==2.13.0
VERSIONS ?= 5.4.0 5.17.0
TRITON ?= 3.6.0
JOBS ?= 2
KEEP ?= 1

export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

FAMILIES = $(1)/bin/scout-hf families --check --jobs $(JOBS)
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(JOBS)

# What a release of transformers can change, and, of the integration tests, what it cannot.
VERSIONED = tests/patches tests/integration tests/unit/test_cache.py tests/eval/test_examples.py \
	tests/eval/test_serve.py tests/eval/test_model_types.py
SAME_EVERYWHERE = native_safety recall trust monitor trace two_devices on_device graph host_dtype sparse devices \
	without_library methods

.PHONY: demo test test-full test-faults test-real test-ray test-upstream test-compiled compiled-launches compiled-gpu-older \
	compiled-gpu-newest compiled-older compiled-newest test-versions lint docs clean

demo: $(VENV)/.installed-demo
	$(VENV)/bin/scout-hf demo --yes

test: $(VENV)/.installed-test
	$(call PYTEST,$(VENV))

test-full: $(VENV)/.installed-test
	$(call PYTEST,$(VENV)) --full-only
	$(call FAMILIES,$(VENV))

test-upstream: $(VENV)/.installed-test
	$(VENV)/bin/pip install -q -e ".[upstream]"
	$(VENV)/bin/python -m tests.upstream.run $(if $(ALL),--all) $(if $(SOURCE),--source $(SOURCE)) || [ $$? = 77 ]

test-faults: $(VENV)/.installed-test
	SCOUT_TEST_JOBS=$(JOBS) SCOUT_TEST_KEEP=$(KEEP) $(VENV)/bin/python -m pytest -m slow -n 0 tests/faults

test-real: $(VENV)/.installed-test
	$(VENV)/bin/pip install -q -e ".[demo,quantised]"
	SCOUT_TEST_NETWORK=1 $(VENV)/bin/python -m pytest -m slow -n 0 -rs tests/eval
	$(call PYTEST,$(VENV)) tests/integration/test_quantised_weights.py

test-ray: $(VENV)/.installed-test
	$(VENV)/bin/pip install -q -e ".[ray]"
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 0 tests/integration/test_batch_ray.py

# The oldest Triton that must serve, in a folder of its own: torch of the CPU brings none, and its index only the newest.
OLDER = build/triton-$(TRITON)
COMPILE = TRITON_INTERPRET=0 TRITON_CACHE_DIR=$(CURDIR)/build/triton-cache PYTHONPATH=$(1)$(CURDIR) \
	$(VENV)/bin/python -m tests.triton.compile_kernels $(2)

test-compiled: $(VENV)/.installed-test $(OLDER)/triton
	$(MAKE) -j $(JOBS) compiled-gpu-older compiled-gpu-newest compiled-older compiled-newest

compiled-launches:
	TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 0 -p tests.gpu.without_gpu tests/gpu \
		--launches build/launches.json

compiled-gpu-older: compiled-launches
	$(call COMPILE,$(CURDIR)/$(OLDER):,build/launches.json)

compiled-gpu-newest: compiled-launches
	$(call COMPILE,,build/launches.json)

compiled-older:
	$(call COMPILE,$(CURDIR)/$(OLDER):)
	$(call COMPILE,$(CURDIR)/$(OLDER):,--capability 80 --once)
	$(call COMPILE,$(CURDIR)/$(OLDER):,--capability 100 --once)

compiled-newest:
	$(call COMPILE)

$(OLDER)/triton:
	$(VENV)/bin/pip install -q --no-deps --target $(OLDER) triton==$(TRITON)

test-versions: $(VERSIONS:%=test-transformers-%)

test-transformers-%: $(VENV)-%/.installed-test
	$(call PYTEST,$(VENV)-$*) $(VERSIONED) $(SAME_EVERYWHERE:%=--ignore tests/integration/test_%.py)
	$(call FAMILIES,$(VENV)-$*)

# The package as it is installed, of which mypy finds all parts: patches lies beside the others here.
TYPED = build/typed

lint: $(VENV)/.installed-test
	$(VENV)/bin/pip install -q -e ".[lint]"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	rm -rf $(TYPED)/scout_hf && mkdir -p $(TYPED)/scout_hf
	ln -sfn $(CURDIR)/scout_hf/* $(CURDIR)/patches $(TYPED)/scout_hf
	cd $(TYPED) && $(abspath $(VENV))/bin/mypy --config-file $(CURDIR)/pyproject.toml -p scout_hf

docs: $(VENV)/.installed
	$(VENV)/bin/pip install -q -e ".[docs]"
	$(VENV)/bin/typer scout_hf.cli utils docs --name scout-hf --title "Command line" --output docs/cli.md
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

NATIVE = setup.py $(wildcard scout_hf/kernels/cpu/native/*)

$(VENV)/.installed: pyproject.toml $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q "$(TORCH)"
	$(VENV)/bin/pip install -q -e .
	touch $@

# Without network the demo takes a pocket model.
$(VENV)/.installed-demo: $(VENV)/.installed
	$(VENV)/bin/pip install -q -e ".[demo]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/pip install -q -e ".[test,eval]"
	touch $@

$(VENV)-%/.installed-test: pyproject.toml $(NATIVE)
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/pip install -q "$(TORCH)"
	$(VENV)-$*/bin/pip install -q -e ".[test]" "transformers==$*"
	touch $@

.SECONDARY:

clean:
	rm -rf $(VENV) $(VENV)-* build dist site *.egg-info scout_hf/kernels/cpu/_scout_cpu.*
