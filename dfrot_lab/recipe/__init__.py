"""Say, immutably and validly, what to do: specs and the keys of what is made from them."""
