"""Programs that other people wrote, run as their users run them."""
