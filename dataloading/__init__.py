"""Data sets, the embedded data set, and the pipelines that load them. Knows nothing of models."""
