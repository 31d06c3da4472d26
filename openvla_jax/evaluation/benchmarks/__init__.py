"""Published benchmarks by their own protocol: episodes that resume and merge, paired arms, a report."""
