"""Sources: where inputs of the student come from that the method does not make itself."""
