"""Callbacks: all that happens around a step. They meet in the `Run` that the entry point sets on the module."""
