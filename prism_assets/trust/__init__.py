"""Trust: whether the weights, the first-order picture and the influence scores hold, measured on the user's own model."""
