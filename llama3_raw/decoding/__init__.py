"""One decoding loop, for one text and for several; sampling, and drafts."""
