"""Streams: the schema of samples, their validation, and the compiler that turns them into token rows."""
