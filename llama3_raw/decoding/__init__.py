"""The decoding loop for one text or a batch of texts; sampling and draft tokens."""
