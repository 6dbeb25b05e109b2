"""Importers: rows of public formats to samples, and back where a format can hold what a sample says."""
