"""Point-to-point messages between workers, and collectives composed over them."""
