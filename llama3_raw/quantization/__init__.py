"""Matrices in fewer bits: how they are made, what they mean, and how to multiply by them."""
