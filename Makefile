PYTHON ?= python3
BIN := .venv/bin
# faiss-cpu and faiss-gpu provide the same module: take the GPU build only where an NVIDIA driver answers.
EXTRA := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
PIP := -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := "torch==$$(sed -n 's/^torch==//p' constraints.txt)"

.PHONY: install test lint docs wheel-test demo ui clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) $(TORCH)
	$(BIN)/python $(PIP) -e '.[$(EXTRA),test,lint,docs]'
	touch $@

test: install
	# A process a core; a file's tests share its fixtures, so they stay together. The order is that of tests/conftest.py.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Types and imports are checked as the package is installed: the folder resources/ is prism_assets.resources.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/installed && mkdir -p build/installed
	cp -r prism_assets build/installed/ && cp -r resources build/installed/prism_assets/
	cp pyproject.toml build/installed/
	cd build/installed && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports pyproject.toml
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pre-commit validate-config

# The site, into build/site; nothing is loaded from elsewhere, and a warning is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# A fresh environment with the built wheel, tried from a folder that holds no clone.
wheel-test: install
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m build --quiet --wheel --outdir build/wheel
	$(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/python $(PIP) $(TORCH)
	build/wheel/env/bin/python $(PIP) "$$(ls $(CURDIR)/build/wheel/*.whl)[$(EXTRA)]"
	cp tests/installed_package.py build/wheel/env/
	cd /tmp && OMP_NUM_THREADS=1 $(CURDIR)/build/wheel/env/bin/python $(CURDIR)/build/wheel/env/installed_package.py

demo: install
	$(BIN)/prism demo runs/demo

ui: install
	$(BIN)/prism ui --config runs/demo/prism.yaml

clean:
	rm -rf runs .venv build *.egg-info
