"""`make demo`: a small Delta-LLaVA, trained from nothing on pictures that it draws, then asked about new ones."""
