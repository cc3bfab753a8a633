"""One file per plug-in that wraps updates of any method; found by scanning this folder."""
