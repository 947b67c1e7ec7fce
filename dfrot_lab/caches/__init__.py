"""One file a quantizer of the KV cache, and what has keys and values read as they are held."""
