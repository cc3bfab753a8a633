"""One file per published system; found by scanning this folder."""
