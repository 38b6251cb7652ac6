"""What a run is: its recipe, its folder, its records, and the machine. Imports nothing of ad2kit."""
