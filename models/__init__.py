"""Plain networks: usable in a notebook without Lightning."""
