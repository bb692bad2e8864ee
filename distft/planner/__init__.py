"""From a recipe and a topology to a plan."""
