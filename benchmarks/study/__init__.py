"""The study behind docs/performance.md: what pruning while training saves, against what."""
