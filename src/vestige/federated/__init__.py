"""Federated clients, on Flower; at present the template of an app folder."""
