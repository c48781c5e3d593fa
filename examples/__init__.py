"""Small real models with data, used as worked examples, tests and benchmarks of mpq."""
