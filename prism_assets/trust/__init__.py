"""Trust: whether the weights, the first-order approximation and the influence scores hold, measured on the user's own
model."""
