"""Log-probabilities over a sharded vocabulary, policy objectives, KL estimators and their metrics."""
