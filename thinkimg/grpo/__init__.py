"""The algorithm, pure: from raw reward components to advantages, and from log-probabilities to the loss."""
