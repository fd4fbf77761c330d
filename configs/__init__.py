"""Recipes (YAML) that ship with the package."""
