"""The backends of add_noise_. Tests compare all others with reference.py."""
