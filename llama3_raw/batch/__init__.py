"""Complete a file of prompts: the command `python -m llama3_raw.batch`."""
