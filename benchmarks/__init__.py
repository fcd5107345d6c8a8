"""Every figure in the README: the command that makes it, and the committed result in `results/`."""
