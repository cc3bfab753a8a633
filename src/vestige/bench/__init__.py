"""Evidence: claims over seeds, cost against the floor."""
