"""Training side of EncNet Serve: the network, its Encoding op, data, losses, training, evaluation and checkpoints."""
