"""Inference at several scales, scores, dense CRF."""
