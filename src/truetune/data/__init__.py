"""A row of data -> a packed batch. Imports nothing else of truetune."""
