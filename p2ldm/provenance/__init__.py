"""How pictures say where they come from: records in them, signed manifests, a log of what was asked."""
