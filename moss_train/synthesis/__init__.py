"""Synthesis: dense captions become real-time dialogues whose answers are revised to match what has been seen so far."""
