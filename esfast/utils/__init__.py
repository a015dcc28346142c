"""What all rooms use, and what knows none of them."""
