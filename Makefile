# Every target sets itself up in .venv; nothing else is needed than Python ≥ 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: setup demo compare ablation gpu-check gpu-upload test test-slow test-wheel docs api lint format types clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "comask needs Python 3.11 or newer; name one by make PYTHON=…"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# Train, export, run and prove, on two idle CPU cores in minutes; first removes what an earlier one left.
demo: setup
	rm -rf $(DEMO)
	$(BIN)/comask train --data shapes --preset shapes-tiny --output $(DEMO)/run
	$(BIN)/comask export $(DEMO)/run/checkpoint-best.pt --output $(DEMO)/bundle
	$(BIN)/comask shapes $(DEMO)/shapes --count 12 --seed 42
	$(BIN)/comask infer $(DEMO)/bundle $(DEMO)/shapes/images --output $(DEMO)/pictures
	$(BIN)/python examples/contact_sheet.py $(DEMO)/bundle $(DEMO)/contact_sheet.png
	$(BIN)/comask eval $(DEMO)/bundle --data shapes --tolerance 0.02 \
	  --backend torch --backend onnxruntime --backend openvino
	@echo "pictures: $(DEMO)/contact_sheet.png $(DEMO)/pictures/*.overlay.png"
	@echo "report:   $(DEMO)/run/report.html"

# The figures of docs/performance.md; each takes the better part of an hour on two cores.
compare: setup
	$(BIN)/python benchmarks/vs_mask_rcnn.py --output runs/vs --seeds 3

ablation: setup
	$(BIN)/python benchmarks/ablation.py --output runs/ablation --seeds 3

# Builds and runs everything that needs a GPU, with the interpreter named by PYTHON=…, else with .venv's;
# sets nothing up and fetches nothing. docs/verified/README.md describes what JSON=… holds, and REHEARSE=1,
# GROUPS=name,name and MINUTES=10.
JSON := runs/gpu-check.json
GPU_PYTHON := $(if $(filter-out file default,$(origin PYTHON)),$(PYTHON),$(or $(wildcard $(BIN)/python),$(PYTHON)))
gpu-check:
	$(GPU_PYTHON) benchmarks/gpu_check --json "$(JSON)" $(if $(BUNDLE),--bundle "$(BUNDLE)") \
	  $(if $(GROUPS),--groups "$(GROUPS)") $(if $(MINUTES),--minutes $(MINUTES)) $(if $(REHEARSE),--rehearse)

# What a rented machine without a network needs for gpu-check, in build/gpu-upload; THERE=package,package
# leaves out what it has, and PYTHON312=… compiles pycuda for it.
gpu-upload: setup
	$(BIN)/python benchmarks/gpu_check/upload.py $(if $(BUNDLE),--bundle "$(BUNDLE)") \
	  $(if $(THERE),--there "$(THERE)") $(if $(PYTHON312),--interpreter "$(PYTHON312)")

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
test: setup $(VENV)/pycuda $(VENV)/triton $(VENV)/cpp
	$(PYTEST) -m "not slow"

# Real servers, a cluster, long runs.
test-slow: setup $(VENV)/rtsp $(VENV)/chromium $(VENV)/s3
	$(PYTEST) -m slow

# The whole suite from the unpacked sdist, with the wheel that is made of it, outside this folder.
RELEASED := /tmp/comask-released
test-wheel: setup $(VENV)/pycuda
	rm -rf $(RELEASED)
	$(BIN)/python tests/install_wheel.py $(RELEASED)
	cp $(VENV)/pycuda $(RELEASED)/venv
	cd $(RELEASED) && COMASK_TEST_DATA="$${COMASK_TEST_DATA:-$(CURDIR)/../shared/data}" OMP_NUM_THREADS=1 \
	  venv/bin/python -m pytest -c source/pyproject.toml --numprocesses auto --maxprocesses 4 --dist loadfile \
	  source/tests

# Writes tests/api, what is public, anew; docs/compatibility.md says which version a change takes.
api: setup
	$(BIN)/python -m pytest tests/test_api.py --write-api --quiet

# The site, in build/site; broken links fail it. tests/test_docs.py runs the pages' code blocks.
docs: setup linked
	$(BIN)/zensical build --clean --strict
	@echo "site: build/site/index.html"

# The GPU runtime's host side is tested with pycuda and stand-ins. It compiles for a minute or two, and
# needs nvcc; where it cannot be built this file says why, and its tests are skipped.
$(VENV)/pycuda: $(VENV)/ready tests/install_pycuda.py
	-$(BIN)/python tests/install_pycuda.py $@

# A real Triton Inference Server, in an environment of its own; where it cannot be had this file says why.
$(VENV)/triton: $(VENV)/ready tests/install_tritonserver.py
	-$(BIN)/python tests/install_tritonserver.py $@

# A real RTSP server and a browser, from Debian's packages; where one cannot be had its file says why.
$(VENV)/rtsp $(VENV)/cpp $(VENV)/chromium: $(VENV)/ready tests/install_debian.py
	-$(BIN)/python tests/install_debian.py $(notdir $@) $@

# An object store, in an environment of its own with s3fs; where it cannot be had this file says why.
$(VENV)/s3: $(VENV)/ready tests/install_s3.py
	-$(BIN)/python tests/install_s3.py $@

lint: setup types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# What reads the source does not follow an editable install's import hook: it gets the package as links.
.PHONY: linked
linked:
	rm -rf .typecheck && mkdir -p .typecheck/comask
	ln -s $(CURDIR)/comask/* .typecheck/comask/
	ln -s $(addprefix $(CURDIR)/,export runtime cli calib) .typecheck/comask/

types: setup linked
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) .typecheck build dist *.egg-info
