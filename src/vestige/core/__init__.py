"""Contracts that every room of the house shares; imports no method and no modality."""
