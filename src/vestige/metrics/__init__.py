"""Metrics: what can be said about inputs and students beside the task's own figures."""
