"""Features of pictures: `extractors` finds one by name, and there is a file for each network."""
