"""Timings of each room, ``cl_kernels.benchmarks`` once installed: ``python -m cl_kernels.benchmarks.bench_X``."""
