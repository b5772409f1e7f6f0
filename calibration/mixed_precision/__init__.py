"""A width for each weight: what each costs the network's result, and the best choice within a budget."""
