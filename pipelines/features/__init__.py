"""What is measured on pictures: feature extractors, and distances between sets by their features."""
