"""Ready YAML files, one per use; `default.yaml` is what `make train` runs without CONFIG."""
