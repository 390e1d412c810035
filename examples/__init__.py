"""Programs around the package that run from a checkout; they are not installed."""
