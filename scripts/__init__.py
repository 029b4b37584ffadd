"""Commands around training and data."""
