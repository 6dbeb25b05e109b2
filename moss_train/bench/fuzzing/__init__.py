"""Hostile and damaged inputs, and the way of a user on which they are tried."""
