"""What is refused before any compute is rented."""
