"""What happens when something breaks, and over long runs."""
