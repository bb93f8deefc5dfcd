"""Benchmarks against what people use today, on one GPU."""
