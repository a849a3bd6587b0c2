"""A pipeline quantized without a calibration: `quantize` reads it part by part, and writes it."""
