"""From target gradients to a selection: preference weights, target direction, ranking, budget."""
