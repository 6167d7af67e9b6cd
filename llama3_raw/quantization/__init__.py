"""Quantized matrices: their format, quantization, dequantization and products."""
