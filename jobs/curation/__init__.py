"""Raw images, captions and speech to a curated set: pure decisions, with Ray Data around them."""
