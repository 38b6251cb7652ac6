"""Before a run: a recipe from a table, what a recipe reads and costs, what the machine offers."""
