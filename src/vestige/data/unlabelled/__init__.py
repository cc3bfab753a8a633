"""Images without labels, of whatever kind and size, decoded for one teacher."""
