"""Adapters that drive one `layerprune.LayerPruner` from other libraries' training loops.

Each needs its library, and is imported by its own name: `layerprune.integrations.lightning`,
`layerprune.integrations.transformers`.
"""
