"""Fuzzing of the parsers that read bytes from elsewhere; `python -m tests.fuzz --help`."""
