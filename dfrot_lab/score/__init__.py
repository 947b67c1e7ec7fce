"""What a recipe is worth: perplexity, tasks, results rows."""
