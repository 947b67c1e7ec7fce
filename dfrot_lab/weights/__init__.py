"""How to quantize weights: one file a quantizer."""
