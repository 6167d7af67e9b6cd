"""Meta's dialog format, conversations, and the command `python -m llama3_raw.chat`."""
