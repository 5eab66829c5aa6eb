"""Floor 4: metrics and evaluations that need more than a loss."""
