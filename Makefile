# Recipes are thin on purpose: decisions are made, and printed, by scripts/*.py. Windows has no make: run the same lines.
PYTHON ?= python3
SEEDS ?= 3
OUT ?= gpu-out
VENV := .venv/bin/python

.PHONY: demo test integrations bench gpu lint native clean

demo:  ## set up .venv, then run the methods on embedded real images, print the table, write the report
	$(PYTHON) scripts/setup_env.py demo
	$(VENV) examples/demo.py --seeds $(SEEDS)

test:  ## set up .venv with the test tools, then run the whole suite, and Triton kernels in their interpreter
	$(PYTHON) scripts/setup_env.py test
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV) -m pytest -q -n auto --maxprocesses 8 --dist loadfile --durations=10
	TRITON_INTERPRET=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV) -m pytest -q -m interpret --durations=5 $(sort $(wildcard tests/test_*triton*.py))

lint:  ## formatting, linting and types, with the versions of the dev extra
	$(PYTHON) scripts/setup_env.py lint
	$(VENV) scripts/lint.py

integrations:  ## the drop-in tests with the real Accelerate, Lightning and Avalanche, in an environment of their own
	$(PYTHON) scripts/setup_env.py test
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV) scripts/integrations.py

bench:  ## the table of every room on this machine, within ten minutes; JSON and table.md in bench-out
	$(PYTHON) scripts/setup_env.py test
	OMP_NUM_THREADS=1 $(VENV) benchmarks/run_all.py --out bench-out --json bench-out/all.json

gpu:  ## on a machine with a GPU, offline: build, tests, sanitizer, benchmarks; JSON and a table in OUT; PART=2/3, resources
	$(if $(wildcard $(VENV)),$(VENV),$(PYTHON)) benchmarks/run_gpu.py --out $(OUT) $(if $(PART),--part $(PART))

native:  ## rebuild the native module in place, incrementally; warnings are errors
	CL_KERNELS_WERROR=1 $(if $(wildcard $(VENV)),$(VENV),$(PYTHON)) setup.py -q build_ext --inplace

clean:  ## remove what was built, not the environment
	rm -rf build dist *.egg-info cl_kernels/_C*.so cl_kernels/_build_info.json
