"""Requests and answers in the form of OpenAI's API, for the commands `serve` and `batch`."""
