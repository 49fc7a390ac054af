"""Comparisons and published protocols, each one script: ``python -m benchmarks`` lists them."""
