"""The manifests: attrs classes, one module a stage."""
