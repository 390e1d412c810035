"""Delta-LLaVA for people and programs that ask over a network."""
