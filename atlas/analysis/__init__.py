"""What is precomputed for every feature: from weights, from the corpus, from a second look at examples."""
