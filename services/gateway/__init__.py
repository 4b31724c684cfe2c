"""Text in, text out: the HTTP front of the suite. Imports no torch."""
