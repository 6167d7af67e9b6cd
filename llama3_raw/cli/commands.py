"""The commands of the package."""

COMMANDS = {
    "chat": "talk to an Instruct model",
    "download": "get a model's weights",
    "batch": "complete many prompts from a file",
    "explain": "follow a prompt to its next token on an HTML page",
    "tracing": "show or save the tensors of a forward pass",
    "compare": "find the first tensor where another implementation diverges",
    "perplexity": "measure how well a model predicts a text",
    "evaluate": "run benchmarks, or measure what a compression costs",
    "convert": "change between Meta's and Hugging Face's format",
    "serve": "answer requests in the form of OpenAI's API, and show a live page",
    "bench": "measure speed, or estimate it for a GPU",
}
"""What each command does, except the main one, `python -m llama3_raw`."""
