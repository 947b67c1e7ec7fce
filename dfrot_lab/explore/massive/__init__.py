"""The massive explorer: any text's residual stream, layer by layer."""
