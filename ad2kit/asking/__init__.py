"""A teacher behind an API: the answers of a language model to the rows of tables."""
