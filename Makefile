PYTHON ?= python3
BIN := .venv/bin
# faiss-cpu and faiss-gpu provide the same module: take the GPU build only where an NVIDIA driver answers.
EXTRA := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: install test demo ui clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),test]'
	touch $@

test: install
	# A process a core; a file's tests share its fixtures, so they stay together. The order is that of tests/conftest.py.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

demo: install
	$(BIN)/prism demo runs/demo

ui: install
	$(BIN)/prism ui --config runs/demo/prism.yaml

clean:
	rm -rf runs .venv build *.egg-info
