"""What quantized models write, side by side."""
