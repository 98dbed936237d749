"""Thresholds of more than one check."""

# Below three target examples' worth of weight (1/Σw²) one or two examples decide what is selected.
FEWEST_EFFECTIVE = 3.0
# Measured over predicted change of J: beyond a factor of two a prediction is off by more than itself.
FIRST_ORDER_RATIO = (0.5, 2.0)
