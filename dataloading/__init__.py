"""Data sets, the embedded data set, and the pipelines that load them. Independent of the models."""
