"""Where problems come from: procedural arithmetic games, files of public datasets, and the tokenizer that fits them."""
