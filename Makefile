# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# The first python3 >= 3.12 found makes .venv; everything else runs from it.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TPU_STAMP := $(VENV)/.installed-tpu
DOCS_STAMP := $(VENV)/.installed-docs
AOT_TESTS := tests/mmi_jax/cli/test_cli_aot.py tests/pallas_kernels/test_top_k.py tests/mmi_jax/method/test_kernels_of_plans.py tests/pallas_kernels/test_mosaic_tpu.py -k "ahead_of_time or aot"
PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && command -v "$$p" && break; done)

.PHONY: demo test slow-test aot-test lint format docs clean

demo: $(STAMP)
	$(BIN)/mmi prefill --demo

test: $(STAMP)
	$(BIN)/pytest -n 2 -m "not slow"

# Eight devices in one process, several hosts, whole scripts.
slow-test: $(STAMP)
	$(BIN)/pytest -n 2 -m slow -k "not aot"

# The tests that compile for TPUs; no TPU is needed, only its compiler, which `make test` does without.
aot-test: $(TPU_STAMP)
	$(BIN)/pytest -n 2 $(AOT_TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site in out/site; a warning is an error. NO_MKDOCS_2_WARNING: the theme announces the future of its build tool.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "mmi-jax needs Python >= 3.12 and none was found on PATH; install one or run: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

$(TPU_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[tpu]'
	@touch $(TPU_STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $(DOCS_STAMP)

clean:
	rm -rf $(VENV) out .pytest_cache .ruff_cache
