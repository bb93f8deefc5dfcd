"""The demo: a small byte-level language model run with sparse attention and sparse weights."""
