"""What a table is: its files, its rows, its texts, whatever format they have."""
