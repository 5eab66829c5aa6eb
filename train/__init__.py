"""Floor 5: objectives, optimizers, the step, the loop, checkpoints, metrics, the command line."""
