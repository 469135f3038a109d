"""The web page: what it asks for, how it is drawn, what it looks like."""
