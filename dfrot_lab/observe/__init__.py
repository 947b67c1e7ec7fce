"""What happens inside a model: captured activations, massive tokens, token errors, the residual stream."""
