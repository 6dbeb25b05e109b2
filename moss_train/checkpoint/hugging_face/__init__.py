"""Weights, sizes and tokenizer in Hugging Face's form: Llama-3.2-Vision (transformers' Mllama) and MOSS-Video-Preview.

`mapping` is the table of names, `source` reads a folder, `sizes` translates config.json, `folder` writes a folder.
"""
