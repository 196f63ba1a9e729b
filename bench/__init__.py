"""One question a file, answered with ratios taken in one run."""
