"""Floor 1: the modules that models are made of, and the operators under them."""
