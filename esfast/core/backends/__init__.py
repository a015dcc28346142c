"""add_noise_ by backend; reference.py is what the others are held to."""
