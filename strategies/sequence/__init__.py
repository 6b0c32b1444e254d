"""Several workers compute one micro-batch together: its sequence is divided among them."""
