"""Floor 3: command line, demo and benchmarks: nothing that the library needs."""
