"""Parts of benchmarks/sensitivity.py, each of which also runs alone."""
