"""The bundled demo: short customer messages to an outdoor-gear shop, with exact answers."""
