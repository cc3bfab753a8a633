"""Teachers: frozen networks, as far as their access level shows them."""
