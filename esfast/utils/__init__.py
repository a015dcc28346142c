"""Helpers that all other packages of esfast use, and that import none of them."""
