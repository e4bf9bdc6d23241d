"""What one starts: the embedded model (`embedded/`), the script that trains it, and the demo."""
