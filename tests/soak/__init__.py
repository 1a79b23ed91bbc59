"""Harm done on purpose, in minutes: ``python -m tests.soak`` (``make soak``)."""
