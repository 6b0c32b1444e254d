"""What a trained captioner says of held-out images: captions, losses with and without the image, a page."""
