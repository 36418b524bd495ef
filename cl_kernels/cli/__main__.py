"""`python -m cl_kernels.cli`: the same as the `cl-kernels` script."""

from cl_kernels.cli import main

main()
