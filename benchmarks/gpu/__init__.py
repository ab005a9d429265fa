"""The CUDA kernels measured beside what torch and transformers offer; benchmarks/gpu.sh runs all of it."""
