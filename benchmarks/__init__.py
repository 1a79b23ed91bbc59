"""How fast the package is, each time against a named rival in the same run: ``python -m benchmarks --help``."""
