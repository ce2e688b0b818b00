"""Training of language models on text: data, checkpoints, the training loop."""
