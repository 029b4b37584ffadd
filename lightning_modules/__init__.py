"""The training rules, one method a file."""
