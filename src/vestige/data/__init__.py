"""Real data for evaluation, teacher training, client simulation and poisoning only."""
