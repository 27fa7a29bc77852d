# make demo: the main job, from nothing.  make test: the tests.  make bench: the benchmarks (ONLY=head for one).
# make test-timm: the tests with the real timm, which `make test` leaves out.
# make gpu: the checks of one GPU, see docs/gpu.md (ONLY=3,4 for some; DEVICE=cpu tries them without one).
# make docs: the pages of docs/ as a site, in site/.
# make campaigns: kills, mutated files, full disks and the checks of `make gpu` at length, which `make test` leaves out.
# make fuzz: the parsers under a coverage-guided fuzzer, SECONDS each.  make audit: known vulnerabilities of the versions
# in constraints.txt.  .ci/matrix: the tests over interpreters and versions.
# Each sets up what it needs in .venv first; PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

SECONDS ?= 60
FUZZED := "records train.rec" "records train.idx" "records property" "pairs pairs.bin" "images a.jpg" "images a.png" \
	"cache rows" "cache rows.json" "components rows.pca.npz" "names pairs.identities.txt" "run checkpoint_gpu_0.pt" \
	"state new.pt" "old_state new.pt" "onnx model.onnx" "mxnet model-symbol.json" "mxnet model-0000.params"

# The machine of a GPU may have torch and no registry: its own interpreter is taken where that is so.
DEVICE ?= cuda
GPU_OUT ?= gpu
ifneq ($(filter gpu,$(MAKECMDGOALS)),)
HAS_TORCH := $(shell $(PYTHON) -c 'import importlib.util as u; print(u.find_spec("torch") and "yes" or "")' 2>/dev/null)
endif

.PHONY: demo test test-timm campaigns bench gpu docs fuzz audit lint clean

demo: $(VENV)/ready
	$(BIN)/arcface-kd demo --out demo $(ARGS)

# A file's tests stay on one worker, and a worker on one core. Four, also on two cores: most tests wait for processes that
# they have started; these take the package's byte code, also where the environment keeps none.
test: $(VENV)/ready-test
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 4 --dist loadfile $(ARGS)

# Without their dependencies: another torch must not come with them.
test-timm: $(VENV)/ready-test
	$(PIP) --no-deps --upgrade --target $(VENV)/timm timm torchvision
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/timm $(BIN)/python -m pytest -m timm $(ARGS)

campaigns: $(VENV)/ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/campaigns $(ARGS)

bench: $(VENV)/ready-test
	$(BIN)/python -m benchmarks $(ONLY)

gpu: $(if $(HAS_TORCH),,$(VENV)/ready-test)
	$(if $(HAS_TORCH),$(PYTHON),$(BIN)/python) -m benchmarks.gpu --device $(DEVICE) --out $(GPU_OUT) \
		$(if $(WHEELS),--wheels $(WHEELS)) $(if $(ONLY),--only $(ONLY))

docs: $(VENV)/ready-test
	$(BIN)/python -m mkdocs build --strict

fuzz: $(VENV)/ready-test
	$(PIP) atheris
	for file in $(FUZZED); do \
		$(BIN)/python -m tests.campaigns.coverage_fuzz $$file -max_total_time=$(SECONDS) -timeout=30 -rss_limit_mb=4096 || exit 1; \
	done

# In an environment of its own: the auditor has its own dependencies.
audit: $(VENV)/bin/python
	$(BIN)/python -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --disable-pip-version-check --quiet pip-audit
	$(VENV)/audit/bin/pip-audit --no-deps --disable-pip --requirement constraints.txt

lint: $(VENV)/ready-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) demo build site *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Run: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready: $(VENV)/bin/python setup.cfg pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade pip
	$(PIP) --editable '.[report]'
	touch $@

$(VENV)/ready-test: $(VENV)/ready
	$(PIP) --editable '.[test]'
	touch $@
