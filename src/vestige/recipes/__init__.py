"""Recipes: YAML in, a ready trainer out. The only room that opens real data for a run."""
