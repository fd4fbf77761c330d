"""Processes, checkpoints, random streams, precision."""
