# Needs python3.11 with its venv module, and make. All else is installed into .venv, once, in the locked versions.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2
# Training takes every GPU, or else one process with all cores (accelerate's own default is one thread).
PROCESSES ?= $(shell gpus=$$(nvidia-smi -L 2>/dev/null | wc -l) || true; echo $$((gpus > 0 ? gpus : 1)))
# Not `accelerate launch`: that program imports torchvision first, which a CPU build of torch may not bear.
LAUNCH = $(BIN)/python -m accelerate.commands.launch --quiet --num_machines 1 --num_processes $(PROCESSES) \
    $(if $(filter-out 1,$(PROCESSES)),--multi_gpu) --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process $$((($$(nproc) + $(PROCESSES) - 1) / $(PROCESSES))) $(LAUNCH_ARGS)
# What `make evaluate` judges: your own student once there is one, or else the shipped one.
STUDENT ?= $(or $(wildcard runs/distill/student),shapes-student)
# For `make lock`: torch stays at this version, and with it torchvision.
TORCH ?= $(shell sed -n 's/^torch==//p' requirements.lock)
WEIGHTS := diffusion_kd/shapes/weights
EXTRAS := train,eval,serve,cluster,otel,app,dev

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SILENT:
.DEFAULT_GOAL := help
.PHONY: help install demo teacher distill evaluate serve test screenshots check format lock ship-teacher ship-student ship-report clean

help: ## list the targets
	grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14
	echo
	echo "Variables: ARGS='...' further arguments of demo, teacher, distill, evaluate, serve, test; STUDENT=... what evaluate judges;"
	echo "PROCESSES=... and LAUNCH_ARGS='...' for accelerate; PYTHON=... what .venv is made with."

install: $(INSTALLED) ## make .venv with everything in requirements.lock

demo: $(INSTALLED) ## distil the embedded teacher for a moment, judge the student, show both
	$(BIN)/python -m training.demo --out runs/demo $(ARGS)

teacher: $(INSTALLED) ## train the small reference teacher on shapes
	$(LAUNCH) -m training.teacher --config shapes --out runs/teacher $(ARGS)

distill: $(INSTALLED) ## distil the reference teacher: the run that made the shipped student
	$(LAUNCH) -m training.distill --config shapes_add_plus --out runs/distill $(ARGS)

# PASS, FAIL and INCONCLUSIVE are answers, with codes 0, 1 and 2: make fails at 3 alone. A script should call eval.run.
evaluate: $(INSTALLED) ## judge the student against its teacher and the quality floor
	$(BIN)/python -m eval.run --student $(STUDENT) --out runs/eval $(ARGS) || [ $$? -lt 3 ]

serve: $(INSTALLED) ## serve teacher and student as two tiers
	$(BIN)/python -m serve $(ARGS)

# One thread for each worker: torch's own would fight over the cores. No test may download anything.
test: $(INSTALLED) ## run the tests
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

screenshots: $(INSTALLED) ## take the documentation's pictures of the playground, in a real browser
	OMP_NUM_THREADS=1 DIFFUSION_KD_TEST_SCREENSHOTS=docs/images/playground DIFFUSION_KD_TEST_NO_SKIPS=1 \
	    $(BIN)/python -m pytest tests/serve/playground -k "beside or kept or pictures or click_away or curves"

check: $(INSTALLED) ## lint, formatting, types, and who imports whom
	$(BIN)/ruff check --quiet --output-format concise
	$(BIN)/ruff format --quiet --check --output-format concise || { echo "some files are not formatted; run make format" >&2; exit 1; }
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED) ## format the code and mend what ruff can mend
	$(BIN)/ruff check --quiet --fix-only
	$(BIN)/ruff format --quiet

lock: ## resolve the newest versions of everything but torch and write requirements.lock
	$(need_python)
	folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(PYTHON) -m venv "$$folder/venv"; \
	"$$folder/venv/bin/pip" install -qq --no-input "torch==$(TORCH)" ".[$(EXTRAS)]"; \
	sed -n '/^#/p' requirements.lock > "$$folder/lock"; \
	"$$folder/venv/bin/pip" freeze --exclude diffusion-kd \
	    | sed -E 's/\+[a-z0-9.]+$$//' | grep -vE '^(nvidia|cuda|triton)' >> "$$folder/lock"; \
	cp "$$folder/lock" requirements.lock

# A student belongs to one teacher: another teacher ships without the students of the last.
ship-teacher: ## copy runs/teacher into the package, in place of teacher, encoder and student
	test -d runs/teacher/teacher || { echo "error: no runs/teacher/teacher; run make teacher first" >&2; exit 2; }
	rm -rf $(WEIGHTS)/shapes-* $(WEIGHTS)/report.json $(WEIGHTS)/cases.json
	cp -r runs/teacher/teacher $(WEIGHTS)/shapes-teacher
	cp -r runs/teacher/encoder $(WEIGHTS)/shapes-encoder

# Its text encoders and autoencoder are its teacher's: links keep the repository small.
ship-student: ## copy runs/distill, a student of the shipped teacher, into the package
	test -d runs/distill/student || { echo "error: no runs/distill/student; run make distill first" >&2; exit 2; }
	for part in vae text_encoder text_encoder_2; do \
	    diff -rq runs/distill/student/$$part $(WEIGHTS)/shapes-teacher/$$part >/dev/null || { \
	        echo "error: the $$part of runs/distill/student is not the shipped teacher's; distil shapes-teacher" >&2; exit 2; }; \
	done
	rm -rf $(WEIGHTS)/shapes-student $(WEIGHTS)/report.json $(WEIGHTS)/cases.json
	cp -r runs/distill/student $(WEIGHTS)/shapes-student
	for part in vae text_encoder text_encoder_2 tokenizer tokenizer_2; do \
	    rm -r $(WEIGHTS)/shapes-student/$$part; ln -s ../shapes-teacher/$$part $(WEIGHTS)/shapes-student/$$part; \
	done

ship-report: ## copy runs/eval, the evaluation of the shipped student, into the package
	grep -qs '"source": "shapes-student"' runs/eval/report.json || { \
	    echo "error: runs/eval is no evaluation of shapes-student; run make evaluate STUDENT=shapes-student first" >&2; exit 2; }
	cp runs/eval/report.json runs/eval/cases.json $(WEIGHTS)

clean: ## remove caches and build outputs; .venv and runs/ stay
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml requirements.lock
	$(need_python)
	echo "installing the locked packages into $(VENV) (a few minutes, once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --no-input --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install -qq --no-input --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(BIN)/python -c "from diffusion_kd import _torchvision; _torchvision.install_startup_line()"
	touch $@

define need_python
$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] < (3, 11))' 2>/dev/null || { \
    echo "error: '$(PYTHON)' is missing, older than 3.11, or lacks venv; install python3.11 and python3.11-venv, or set PYTHON=" >&2; \
    exit 1; }
endef
