"""Losses: pure functions of tensors, usable without the trainer."""
