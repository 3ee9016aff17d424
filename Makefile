# Sievit: every command sets up what it needs first. `make help` lists them.

VENV ?= .venv
PYTHON ?=
CONSTRAINTS ?= constraints.txt
PY := $(VENV)/bin/python
STAMP := $(VENV)/.sievit-installed
DEV := $(VENV)/.sievit-dev

# results/embedded, results/imagefolder, results/torchvision-CIFAR10, …
OUT ?= results/$(subst /,-,$(subst :,-,$(or $(WORKLOAD),embedded)))
GPU_FOLDER ?= results/gpu-ablations/folder
TESTS ?= tests
SMOKE_SPECS ?= k_values class_token
FLOOR_TESTS ?= tests/reducers/test_contract.py tests/ablations/test_store.py tests/ablations/test_spec.py \
	tests/workloads/test_named.py tests/workloads/test_image_folder.py tests/analysis/test_frame.py \
	tests/analysis/test_stats.py
# as many tests at once as there are cores (each takes about a gigabyte, so at most four), each on one
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal

# the options of a run, each passed on only when it is set
option = $(if $($(1)),--$(2) '$($(1))')
FOLDER_OPTIONS = $(call option,LABELS,labels) $(if $(filter no 0 off false,$(LINKS)),--no-links)
CLIP_OPTIONS = $(call option,FRAMES,frames) $(call option,STRIDE,stride) $(call option,VIEWS,views)
RUN_OPTIONS = $(call option,WORKLOAD,workload) $(call option,DATA,data) $(call option,MODEL,model) \
	$(call option,IMG_SIZE,img-size) $(call option,WEIGHTS,weights) $(call option,BATCH,batch) $(call option,WORKERS,workers) \
	$(CLIP_OPTIONS) \
	$(call option,TRAIN_DATA,train-data) $(call option,TASK,task) $(if $(PROFILE),--profile) $(FOLDER_OPTIONS)

.DEFAULT_GOAL := help
.PHONY: help ablations recommend smoke test test-slow test-floors lint train docs bench bench-scaling bench-gpu gpu-folder ablations-gpu weights report clean

help: ## this list
	@echo 'Sievit: which tokens can a vision transformer do without? Set-up is part of every target.'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo 'variables (all optional):'
	@echo '  WORKLOAD   embedded (default), embedded:v1, moving_digits, imagefolder, clips, timm:SPEC, torchvision:NAME, hub:NAME'
	@echo '  DATA       folder of the images, for workloads that read one'
	@echo '  LABELS     a file of labels (val.txt, LOC_val_solution.csv), order or index (default: found out)'
	@echo '  LINKS=no   do not follow links in DATA to folders or out of it'
	@echo '  MODEL      a timm name, such as deit_small_patch16_224 (default: the embedded model)'
	@echo '             hf-hub:OWNER/NAME, local-dir:FOLDER, or of transformers hf:FOLDER or hf:OWNER/NAME'
	@echo '  IMG_SIZE   384, or 384,320 (height, width): another size of image than the model'"'"'s own'
	@echo '  FRAMES     frames of a clip (default: the model'"'"'s own); for WORKLOAD=clips DATA=FOLDER also'
	@echo '  STRIDE     frames of the video from one to the next (default: spread over it), and'
	@echo '  VIEWS      crops (3), or views in time x crops (4x3), whose answers are averaged (default: 1)'
	@echo '  WEIGHTS    a .safetensors file, or random (default: the model'"'"'s own)'
	@echo '  TASK       classify (default), embed: features beside the dense model, no labels, or dense: patches against masks'
	@echo '  SPECS      names of specs or .yaml files, such as SPECS="k_values class_token" (default: all)'
	@echo '  LIMIT      evaluate at most that many images, spread over the classes'
	@echo '  BATCH      images in a batch          WORKERS  trials at once'
	@echo '  TRAIN_DATA folder of training images, for specs that finetune (default: DATA/train)'
	@echo '  COST       for recommend: shares of the dense cost (COST="0.5 0.7"); SPEED=1.5: times as fast, here'
	@echo '  CANDIDATES for recommend: placements to try for each (96); SEED: of the search (0)'
	@echo '  TRAINED    for recommend: folders of trainings whose weights are tried as well; HOST=fill=zero drives the model so'
	@echo '  METHOD     for train: registered names, or all (none: list them); SET="epochs=1" changes its recipe'
	@echo '  PROFILE=1  tell where the time went'
	@echo '  GPU_FOLDER for gpu-folder and ablations-gpu: the folder that travels (default: $(GPU_FOLDER))'
	@echo '  SIZE       pixels, DTYPE  precisions: for bench, each may be several (DTYPE="float32 bfloat16")'
	@echo '  OUT        folder of the results (default: results/WORKLOAD)'
	@echo '  TO         for report: write it to this folder, where OUT may only be read'
	@echo '  VENV       the environment to install into (default: .venv; VENV=$$VIRTUAL_ENV uses the active one)'
	@echo '  RAY_ADDRESS=HOST:PORT runs the trials on an existing Ray cluster'
	@echo
	@echo 'examples:'
	@echo '  make ablations'
	@echo '  make ablations WORKLOAD=imagefolder DATA=imagenet/val MODEL=deit_small_patch16_224 LIMIT=5000'

ablations: $(STAMP) ## run the ablations that are not finished yet, then draw the figures and the report
	@status=0; \
	$(PY) -m ablations run --out '$(OUT)' $(call option,SPECS,specs) $(call option,LIMIT,limit) $(RUN_OPTIONS) \
		|| status=$$?; \
	if [ $$status -gt 1 ]; then exit $$status; fi; \
	$(PY) -m ablations report --out '$(OUT)' || exit $$?; \
	exit $$status

recommend: $(STAMP) ## which token reduction this model should use: COST=0.5 (or several), or SPEED=1.5 (minutes)
	@$(PY) -m ablations recommend --out '$(OUT)' $(call option,COST,cost) $(call option,SPEED,speed) \
		$(call option,LIMIT,limit) $(call option,CANDIDATES,candidates) $(call option,SEED,seed) \
		$(call option,TRAINED,trained) $(call option,HOST,host) \
		$(if $(SERIAL),--serial) $(RUN_OPTIONS)

train: $(STAMP) ## train a method and put it beside random drop: METHOD=dynamicvit (several: METHOD="a b"; minutes)
	@$(PY) -m ablations train $(METHOD) --out '$(OUT)' $(call option,WORKLOAD,workload) $(call option,DATA,data) \
		$(call option,MODEL,model) $(call option,IMG_SIZE,img-size) $(call option,WEIGHTS,weights) \
		$(call option,TRAIN_DATA,train-data) $(CLIP_OPTIONS) \
		$(call option,LIMIT,limit) $(FOLDER_OPTIONS) $(if $(SET),--set $(SET))

smoke: ## two specs on 256 images, in about a minute: does everything work here?
	@$(MAKE) --no-print-directory ablations SPECS='$(SMOKE_SPECS)' LIMIT=256 OUT=results/smoke

test: $(DEV) ## all tests but the slow ones (TESTS=tests/reducers for a part)
	$(PYTEST) -m 'not slow' $(TESTS)

test-slow: $(DEV) ## the slow tests
	$(PYTEST) -m slow $(TESTS)

test-floors: ## a part of the tests with the oldest versions allowed (FLOORS="torch==2.13.0" replaces some)
	python=$$(command -v $(or $(PYTHON),python3.11)) || { echo 'error: the floors have wheels for Python 3.11; name one: make test-floors PYTHON=…' >&2; exit 1; }; \
	"$$python" -m venv .venv-floors && "$$python" tests/floors.py $(FLOORS) > .venv-floors/floors.txt && \
	.venv-floors/bin/python -m pip install --quiet -r .venv-floors/floors.txt && \
	.venv-floors/bin/python -m pip install --quiet --no-deps --editable . && \
	OMP_NUM_THREADS=1 .venv-floors/bin/python -m pytest -q -m 'not slow' $(FLOOR_TESTS) && \
	.venv-floors/bin/python -m ablations run --specs k_values class_token --limit 256 --out results/floors && \
	.venv-floors/bin/python -m ablations report --out results/floors

lint: $(DEV) ## style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# a GPU machine may have torch, timm and safetensors in an environment of its own: then nothing is installed
bench_python = $$(for python in '$(PY)' python3 python; do \
	if $$python -c 'import torch, timm, safetensors' >/dev/null 2>&1; then echo "$$python"; break; fi; done)
BENCH_OPTIONS = $(call option,WEIGHTS,weights) $(call option,DATA,data)

bench: $(STAMP) ## measured speed of each reducer against the dense model
	$(PY) -m benchmarks speed $(BENCH_OPTIONS) $(call option,MODEL,model) $(call option,BATCH,batch) \
		$(call option,SIZE,size) $(call option,DTYPE,dtype)

bench-scaling: $(STAMP) ## time and memory against tokens and batch, and the share that deciding takes
	$(PY) -m benchmarks scaling $(call option,MODEL,model)

bench-gpu: ## the speed tables of one large GPU, in bfloat16, within five minutes
	@python="$(bench_python)"; \
	if [ -z "$$python" ]; then $(MAKE) --no-print-directory '$(STAMP)' && python='$(PY)' || exit $$?; fi; \
	"$$python" -m benchmarks gpu $(BENCH_OPTIONS)

gpu-folder: $(STAMP) ## run the ablations for a GPU on this CPU, and write what a GPU needs for the same to GPU_FOLDER
	$(PY) -m benchmarks.gpu_ablations prepare --out '$(GPU_FOLDER)' $(call option,LIMIT,limit) $(call option,SPECS,specs)

ablations-gpu: ## the same on a GPU, from GPU_FOLDER, with torch and timm alone: minutes, and agreement with the CPU
	@python="$(bench_python)"; "$${python:-python3}" -m benchmarks.gpu_ablations run '$(GPU_FOLDER)'

docs: $(STAMP) ## make docs/methods and docs/families.md again from docstrings and hosts
	$(PY) -m ablations docs

weights: $(STAMP) ## train the embedded models again and replace the shipped weights (hours without a GPU)
	$(PY) -m ablations.workloads.train_embedded --out ablations/models/weights
	$(PY) -m ablations.workloads.train_pairs --out ablations/models/weights
	$(PY) -m ablations.workloads.train_siblings --out ablations/models/weights
	$(PY) -m ablations.workloads.train_clips --out ablations/models/weights
	$(PY) -m ablations.measure.separation --card ablations/models/weights

report: $(STAMP) ## draw figures, tables and report.html again from the results in OUT
	$(PY) -m ablations report --out '$(OUT)' $(call option,TO,to)

clean: ## remove caches and build files; results and the environment stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find ablations analysis reducers tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# $(STAMP): what runs and trainings need; $(DEV): what tests, types and ONNX need as well
define install
	@set -e; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		base=; \
		for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
			if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
				base=$$candidate; break; \
			fi; \
		done; \
		if [ -z "$$base" ]; then \
			echo 'error: Python 3.11 or newer is needed and none was found; install it, or name it: make PYTHON=/path/to/python3' >&2; \
			exit 1; \
		fi; \
		echo "creating $(VENV) with $$($$base --version)"; \
		if ! $$base -m venv '$(VENV)'; then \
			echo "error: $$base cannot create an environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
			exit 1; \
		fi; \
	fi; \
	if ! $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo 'error: $(VENV) holds a Python older than 3.11; remove it, or name another: make VENV=folder' >&2; \
		exit 1; \
	fi; \
	echo 'installing into $(VENV) (the first time takes some minutes) …'; \
	$(PY) -m pip install --quiet $(if $(CONSTRAINTS),--constraint '$(CONSTRAINTS)') --editable '.[$(1)]'; \
	touch $(2)
endef

$(STAMP): pyproject.toml $(wildcard $(CONSTRAINTS))
	$(call install,video,'$@')

$(DEV): pyproject.toml $(wildcard $(CONSTRAINTS))
	$(call install,dev,'$(STAMP)' '$@')
