"""Measurements of the whole: layouts against one process, and what they cost. Each prints figures and a verdict."""
