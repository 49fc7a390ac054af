"""The demo (`python -m tutorials.demo`) and the notebooks."""
