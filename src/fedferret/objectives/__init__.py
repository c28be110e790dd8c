"""What training minimises and what evaluation counts."""
