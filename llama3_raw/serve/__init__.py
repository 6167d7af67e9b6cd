"""A server with OpenAI's API and a live page: the command `python -m llama3_raw.serve`."""
