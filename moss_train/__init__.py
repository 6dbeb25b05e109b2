"""moss_train: training of real-time video-language models."""

__version__ = "0.1.0"
