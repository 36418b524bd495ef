# The recipes are thin on purpose: what they decide is written, and printed, by scripts/*.py.
PYTHON ?= python3
SEEDS ?= 3
OUT ?= gpu-out
VENV := .venv/bin/python

.PHONY: demo test bench gpu lint native clean

native:  ## rebuild the native module in place, incrementally; warnings are errors
	CL_KERNELS_WERROR=1 $(if $(wildcard $(VENV)),$(VENV),$(PYTHON)) setup.py -q build_ext --inplace
