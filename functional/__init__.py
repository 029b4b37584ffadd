"""Pure functions on tensors and arrays, and the class tables."""
