"""Timings of each room; ``cl_kernels.benchmarks`` once installed. Run one as ``python -m cl_kernels.benchmarks.bench_X``."""
