# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# The first python3 >= 3.12 found makes .venv; everything else runs from it.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TPU_STAMP := $(VENV)/.installed-tpu
DOCS_STAMP := $(VENV)/.installed-docs
AOT_TESTS := tests/mmi_jax/cli/aot/test_cli_aot.py tests/pallas_kernels/test_top_k.py tests/mmi_jax/method/test_kernels_of_plans.py tests/pallas_kernels/test_mosaic_tpu.py -k "ahead_of_time or aot"
# A file stays in one process: its tests share compiled programs.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile
# The meaning in small: masks by hand, patterns, block lists, kernels against references.
QUICK_TESTS := tests/test_imports.py tests/mmi_jax/test_layout.py tests/mmi_jax/method/test_patterns.py tests/mmi_jax/method/test_permutation.py tests/mmi_jax/method/test_kv_views.py tests/mmi_jax/method/test_token_groups.py tests/mmi_jax/method/test_estimate.py tests/pallas_kernels/test_block_sparse_attention.py
# The tests that compare numbers of two programs.
NUMERIC_TESTS := tests/mmi_jax/engine/test_continue.py tests/mmi_jax/engine/test_batching.py tests/mmi_jax/engine/test_prefill.py tests/mmi_jax/engine/test_decode.py tests/mmi_jax/method/test_attention.py tests/mmi_jax/method/test_dispatch.py tests/mmi_jax/test_flax.py tests/mmi_jax/search/test_importance.py tests/pallas_kernels/test_block_sparse_attention.py tests/pallas_kernels/test_decode_attention.py tests/pallas_kernels/test_column_mass.py tests/models/qwen2_5_vl
OPTIMIZED := --xla_backend_optimization_level=3
ISA ?= AVX2
PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && command -v "$$p" && break; done)

.PHONY: demo test quick slow-test isa-test aot-test lint format docs wheel clean

demo: $(STAMP)
	$(BIN)/mmi prefill --demo

test: $(STAMP)
	$(PYTEST) -m "not slow" --durations=25

quick: $(STAMP)
	$(PYTEST) -m "not slow" $(QUICK_TESTS)

# Eight devices in one process, several hosts, whole scripts and whole programs.
slow-test: $(STAMP)
	$(PYTEST) -m slow -k "not aot" --durations=25

# The tests that compare numbers, with the compiler's optimizations: sums are then taken in an order that depends on the
# processor's vector instructions. Once as the processor has them, once with those of ISA (AVX, AVX2 or AVX512).
isa-test: $(STAMP)
	XLA_FLAGS="$(OPTIMIZED)" $(PYTEST) -m "not slow" $(NUMERIC_TESTS)
	XLA_FLAGS="$(OPTIMIZED) --xla_cpu_max_isa=$(ISA)" $(PYTEST) -m "not slow" $(NUMERIC_TESTS)

# The tests that compile for TPUs; no TPU is needed, only its compiler, which `make test` does without.
aot-test: $(TPU_STAMP)
	XLA_FLAGS="$(OPTIMIZED)" $(PYTEST) $(AOT_TESTS)

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

# Source distribution and wheel; the wheel's demo runs in an environment of its own, away from the checkout, and with a
# cache of its own: executables of two versions in one directory disturb each other on a CPU (docs/log.md).
wheel: $(STAMP)
	rm -rf out/dist out/wheel
	$(BIN)/python -m build --outdir out/dist
	$(PYTHON) -m venv out/wheel
	out/wheel/bin/python -m pip install --quiet -c constraints.txt out/dist/*.whl
	cd out/wheel && XDG_CACHE_HOME=$$PWD/cache bin/mmi prefill --demo

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
