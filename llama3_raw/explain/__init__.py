"""The command `python -m llama3_raw.explain`."""
